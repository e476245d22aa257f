"""More families of architectures, for docs/architectures.md: too many to be tested one by one in CI.

Like `ARCHITECTURES`: public packages' own classes, small, with random weights. A few that have something of their own
(`TESTED`) are tested, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures import (
    BERT,
    CLASSES,
    DEPTH,
    HEADS,
    LLAMA,
    VIT,
    WIDTH,
    WORDS,
    Architecture,
    Built,
    hugging_face,
    images,
    labels,
    pairs,
    pixels,
    seeded,
    text,
)
from tests.graph_cases import joined, rings
from tests.torchvision_schemas import torchvision_models

# torchvision ---------------------------------------------------------------------------------------------------------


def densenet() -> nn.Module:
    return torchvision_models().DenseNet(4, (2, 2), 8, num_classes=CLASSES)


def regnet() -> nn.Module:
    module = torchvision_models().regnet
    sizes = {"depth": 4, "w_0": 8, "w_a": 8.0, "w_m": 2.0, "group_width": 8}
    parameters = module.BlockParams.from_init_params(**sizes, se_ratio=0.25)
    return module.RegNet(parameters, num_classes=CLASSES, stem_width=8)


def shufflenet() -> nn.Module:
    return torchvision_models().ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 32], num_classes=CLASSES)


def vgg() -> nn.Module:
    """VGG's layers at a small width; its classifier's 4096 units are the class's own, so they are exchanged."""
    module = torchvision_models().vgg
    model = module.VGG(module.make_layers([8, "M", 16, "M"], batch_norm=True), num_classes=CLASSES, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d((2, 2))
    model.classifier = nn.Sequential(nn.Linear(64, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, CLASSES))
    return model


def squeezenet() -> nn.Module:
    module = torchvision_models().squeezenet
    model = module.SqueezeNet(num_classes=CLASSES)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(True), module.Fire(8, 4, 8, 8), module.Fire(16, 4, 8, 8)]
    model.features = nn.Sequential(*layers)
    model.classifier[1] = nn.Conv2d(16, CLASSES, 1)
    return model


def inception() -> nn.Module:
    """Inception's and GoogLeNet's blocks in a row: the whole nets start at 24 and 6 million parameters."""
    torchvision_models()
    googlenet, three = (importlib.import_module(f"torchvision.models.{name}") for name in ("googlenet", "inception"))
    return nn.Sequential(
        googlenet.BasicConv2d(3, 8, kernel_size=3, stride=2),
        googlenet.Inception(8, 4, 4, 8, 4, 8, 4),
        three.InceptionC(24, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(768, CLASSES),
    )


class Pixelwise(nn.Module):
    """The output of a segmentation network without its dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["out"]


def segmentation(head: str) -> Architecture:
    """torchvision's own FCN or DeepLab head and resizing on two convolutions; classes on axis 1."""

    def build(examples: int) -> Built:
        models = torchvision_models()
        module = getattr(models.segmentation, head)
        backbone = nn.ModuleDict({"0": nn.Conv2d(3, 8, 3, 2, 1), "1": nn.ReLU()})
        backbone = models._utils.IntermediateLayerGetter(backbone, {"1": "out"})
        model = (
            module.FCN(backbone, module.FCNHead(8, CLASSES))
            if head == "fcn"
            else module.DeepLabV3(backbone, nn.Sequential(module.ASPP(8, [2, 3], 8), nn.Conv2d(8, CLASSES, 1)))
        )
        return Pixelwise(model), torch.randn(examples, 3, 6, 6), labels(examples, 6, 6)

    return Architecture("torchvision", seeded(build))


def r3d() -> Architecture:
    """R3D-18's own blocks at an eighth of its width."""

    def build(examples: int) -> Built:
        video = torchvision_models().video.resnet
        model = video.VideoResNet(video.BasicBlock, [video.Conv3DSimple] * 4, [1, 1, 1, 1], video.BasicStem, CLASSES)
        model.stem[0] = nn.Conv3d(3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        model.stem[1], model.inplanes = nn.BatchNorm3d(8), 8
        for number, stride in enumerate((1, 2, 2, 2)):
            layer = model._make_layer(video.BasicBlock, video.Conv3DSimple, 4 * 2**number, 1, stride)
            setattr(model, f"layer{number + 1}", layer)
        model.fc = nn.Linear(32, CLASSES)
        return model, torch.randn(examples, 3, 4, 16, 16), labels(examples)

    return Architecture("torchvision", seeded(build))


# Hugging Face --------------------------------------------------------------------------------------------------------

ROBERTA: dict[str, Any] = BERT | {"max_position_embeddings": 12}
EXPERTS: dict[str, Any] = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}
STAGES: dict[str, Any] = {"num_labels": CLASSES, "initializer_range": 0.5}


def sounds(length: int, **more: Any) -> Callable[[int], dict[str, Tensor]]:
    def make(examples: int) -> dict[str, Tensor]:
        given = {key: value(examples) for key, value in more.items()}
        return {"input_values": torch.randn(examples, length)} | given

    return make


def spectrograms(examples: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(examples, 4, 8),
        "decoder_input_ids": torch.randint(1, WORDS, (examples, 4)),
    }


def segformer() -> Architecture:
    options = STAGES | {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 8,
    }
    classified = hugging_face("SegformerForSemanticSegmentation", "SegformerConfig", options, pixels)

    def build(examples: int) -> Built:
        model, inputs, _ = classified.build(examples)
        return model, {"pixel_values": inputs["pixel_values"][..., :8, :8]}, labels(examples, 4, 4)

    return Architecture("transformers", seeded(build))


def causal(family: str, config: str | None = None, name: str | None = None, **options: Any) -> Architecture:
    """The family's language model, of Llama's sizes."""
    return hugging_face(
        name or f"{family}ForCausalLM", config or f"{family}Config", LLAMA | {"head_dim": 4} | options, text
    )


def classifier(family: str, inputs: Callable[[int], Any] = text, **options: Any) -> Architecture:
    return hugging_face(f"{family}ForSequenceClassification", f"{family}Config", BERT | options, inputs)


def vision(family: str, inputs: Callable[[int], Any] = pixels, **options: Any) -> Architecture:
    return hugging_face(f"{family}ForImageClassification", f"{family}Config", options, inputs)


# PyTorch Geometric ---------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A network over nodes, the mean over each graph's, and a linear head."""

    def __init__(self, gnn: nn.Module, reads: str = "") -> None:
        super().__init__()
        self.gnn, self.head = gnn, nn.Linear(6, CLASSES)
        self.reads = reads

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        more = {"edge_attr": edge_attr} if self.reads == "edges" else {"batch": batch} if self.reads == "batch" else {}
        return self.head(global_mean_pool(self.gnn(x, edge_index, **more), batch))


class GPS(nn.Module):
    """A graph transformer: messages along edges beside attention among all nodes of a graph (GPSConv)."""

    def __init__(self) -> None:
        super().__init__()
        import torch_geometric.nn as geometric

        self.enter = nn.Linear(3, 6)
        self.conv = geometric.GPSConv(6, geometric.GINConv(nn.Linear(6, 6)), heads=2, norm="layer_norm")

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.conv(self.enter(x), edge_index, batch)


def graphs(make: Callable[[Any], nn.Module], reads: str = "") -> Architecture:
    """A network of torch_geometric.nn on a batch of graphs of unequal sizes, told apart by `batch`."""

    def build(examples: int) -> Built:
        import torch_geometric.nn

        model = Pooled(make(torch_geometric.nn), reads)
        # attention over dense graphs takes nodes in the order of their graphs alone
        inputs, _ = joined(rings([3, 1, 4, 2, 5, 2][:examples]), shuffle=reads != "batch")
        inputs = {key: t.float() if t.is_floating_point() else t for key, t in inputs.items()}
        return model, inputs, torch.arange(examples) % CLASSES

    return Architecture("torch_geometric", seeded(build), example_index="batch")


# Compared with brute force in CI, too: experts of transformers, and attention over graphs.
TESTED = ("mixtral_lm", "graph_transformer")
FAMILIES: dict[str, Architecture] = {
    "densenet": images(densenet, 16),
    "regnet": images(regnet, 16),
    "shufflenet_v2": images(shufflenet, 32),
    "vgg_bn": images(vgg, 8),
    "squeezenet": images(squeezenet, 16),
    "inception_blocks": images(inception, 8),
    "fcn": segmentation("fcn"),
    "deeplabv3": segmentation("deeplabv3"),
    "r3d": r3d(),
    "qwen2_lm": causal("Qwen2"),
    "qwen3_lm": causal("Qwen3"),
    "mistral_lm": causal("Mistral", sliding_window=3),
    "phi_lm": causal("Phi"),
    "phi3_lm": causal("Phi3"),
    "gemma_lm": causal("Gemma"),
    "gemma2_lm": causal("Gemma2"),
    "opt_lm": hugging_face("OPTForCausalLM", "OPTConfig", BERT | {"ffn_dim": 16, "word_embed_proj_dim": 8}, text),
    "gpt_neox_lm": causal("GPTNeoX"),
    "falcon_lm": hugging_face("FalconForCausalLM", "FalconConfig", LLAMA | {"ffn_hidden_size": 16, "bias": True}, text),
    "mixtral_lm": hugging_face("MixtralForCausalLM", "MixtralConfig", EXPERTS, text),
    "qwen2_moe_lm": causal(
        "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
    "distilbert_classifier": hugging_face(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        HEADS
        | {"vocab_size": WORDS, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "initializer_range": 0.5}
        | {"max_position_embeddings": 8},
        text,
    ),
    "roberta_classifier": classifier("Roberta", max_position_embeddings=12),
    "deberta_v2_classifier": classifier(
        "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=4, position_buckets=4
    ),
    "electra_classifier": classifier("Electra", embedding_size=8),
    "albert_classifier": classifier("Albert", embedding_size=4),
    "modernbert_classifier": classifier("ModernBert", sep_token_id=2, cls_token_id=1),
    "bart": hugging_face(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "max_position_embeddings": 8,
            "init_std": 0.5,
        },
        pairs,
    ),
    "whisper": hugging_face(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "num_mel_bins": 4,
            "max_source_positions": 4,
            "max_target_positions": 8,
            "init_std": 0.5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        spectrograms,
    ),
    "wav2vec2_classifier": hugging_face(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        HEADS
        | DEPTH
        | {
            "vocab_size": WORDS,
            "conv_dim": [8, 8],
            "conv_stride": [2, 2],
            "conv_kernel": [4, 3],
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 6,
        },
        sounds(32),
    ),
    "swin": vision(
        "Swin",
        **STAGES,
        image_size=16,
        patch_size=2,
        embed_dim=WIDTH,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=2,
        mlp_ratio=2.0,
    ),
    "convnext_v2": vision("ConvNextV2", **STAGES, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2),
    "dinov2": vision("Dinov2", **VIT, mlp_ratio=2),
    "beit": vision("Beit", **VIT, use_relative_position_bias=True),
    "deit": vision("DeiT", **VIT),
    "segformer": segformer(),
    "mobilevit": vision(
        "MobileViT",
        **STAGES,
        image_size=32,
        hidden_sizes=[8, 12, 16],
        neck_hidden_sizes=[4, 8, 8, 12, 12, 16, 16],
        num_attention_heads=2,
        expand_ratio=2.0,
    ),
    "gcn": graphs(lambda geometric: geometric.GCN(3, 8, 2, 6, norm="BatchNorm")),
    "gat": graphs(lambda geometric: geometric.GAT(3, 8, 2, 6, heads=2, edge_dim=2), "edges"),
    "gatv2": graphs(lambda geometric: geometric.GAT(3, 6, 1, 6, heads=2, v2=True, edge_dim=2), "edges"),
    "gin": graphs(lambda geometric: geometric.GIN(3, 8, 2, 6)),
    "graphsage": graphs(lambda geometric: geometric.GraphSAGE(3, 8, 2, 6)),
    "graph_transformer": graphs(lambda geometric: geometric.TransformerConv(3, 3, heads=2, edge_dim=2), "edges"),
    "gps": graphs(lambda geometric: GPS(), "batch"),
}

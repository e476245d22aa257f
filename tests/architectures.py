"""The table of architectures: public packages' own classes, small, with random weights, a batch and a loss each.

`ARCHITECTURES[name].build(N)` gives `(model, inputs, targets)` for N examples, the same ones every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvscope.load.huggingface import broken_torchvision_hidden
from tests.torchvision_schemas import torchvision_models

CLASSES = 3
WORDS = 13
TIME = 5
WIDTH = 8

Built = tuple[nn.Module, Any, Any]


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        package: where the class comes from.
        build: `N -> (model, inputs, targets)`.
        loss: as `analyze` takes it.
        example_axes: for inputs whose examples are not along axis 0.
        example_index: for batches of graphs, the input that holds every node's graph.
    """

    package: str
    build: Callable[[int], Built]
    loss: Any = "cross_entropy"
    example_axes: Mapping[str, int] = field(default_factory=dict)
    example_index: str | None = None


def per_token(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the terms of outputs [N, T, C]."""
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def seeded(make: Callable[[int], Built]) -> Callable[[int], Built]:
    """The same weights and the same data on every call; the caller's random state stays."""

    def build(examples: int) -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs, targets = make(examples)
            torch.manual_seed(1)  # the data took more or fewer draws
            return unsettled(model), inputs, targets

    return build


def labels(*shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, shape)


def unsettled(model: nn.Module) -> nn.Module:
    """Nothing left at a constant it was set to: scales of 1, biases and heads of 0, layer scales of 1e-6.

    A head of zeros, as torchvision's VisionTransformer starts with, would let no curvature through.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


# torchvision ---------------------------------------------------------------------------------------------------------


def resnet18() -> nn.Module:
    """ResNet-18's own blocks and strides at an eighth of its width, which its constructor can't change."""
    resnet = torchvision_models().resnet
    model = resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2], num_classes=CLASSES)
    model.conv1, model.bn1, model.inplanes = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), 8
    for number, stride in enumerate((1, 2, 2, 2)):
        layer = model._make_layer(resnet.BasicBlock, 8 * 2**number, 2, stride)
        setattr(model, f"layer{number + 1}", layer)
    model.fc = nn.Linear(64, CLASSES)
    return model


def mobilenet_v2() -> nn.Module:
    setting = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 2, 2]]  # expansion, channels, blocks, stride
    models = torchvision_models()
    model = models.MobileNetV2(CLASSES, width_mult=1.0, inverted_residual_setting=setting)
    # The last convolution has 1280 channels whatever the width.
    model.features[-1] = models.mobilenetv2.Conv2dNormActivation(16, 32, 1, activation_layer=nn.ReLU6)
    model.classifier[1] = nn.Linear(32, CLASSES)
    return model


def efficientnet_b0() -> nn.Module:
    efficientnet = torchvision_models().efficientnet
    setting = [  # expansion, kernel, stride, channels in and out, blocks
        efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1),
        efficientnet.MBConvConfig(4, 3, 2, 8, 16, 2),
        efficientnet.MBConvConfig(4, 5, 2, 16, 16, 1),
    ]
    return efficientnet.EfficientNet(setting, dropout=0.2, num_classes=CLASSES, last_channel=32)


def convnext() -> nn.Module:
    module = torchvision_models().convnext
    setting = [module.CNBlockConfig(8, 16, 2), module.CNBlockConfig(16, None, 1)]
    return module.ConvNeXt(setting, num_classes=CLASSES)


def swin() -> nn.Module:
    models = torchvision_models()
    return models.SwinTransformer([2, 2], WIDTH, [2, 1], [2, 2], [2, 2], num_classes=CLASSES)


def swin_v2() -> nn.Module:
    module = torchvision_models().swin_transformer
    return module.SwinTransformer(
        [2, 2],
        WIDTH,
        [1, 1],
        [2, 2],
        [2, 2],
        num_classes=CLASSES,
        block=module.SwinTransformerBlockV2,
        downsample_layer=module.PatchMergingV2,
    )


def vision_transformer() -> nn.Module:
    return torchvision_models().VisionTransformer(16, 8, 1, 2, WIDTH, 16, num_classes=CLASSES)


def images(make: Callable[[], nn.Module], size: int) -> Architecture:
    def build(examples: int) -> Built:
        return make(), torch.randn(examples, 3, size, size), labels(examples)

    return Architecture("torchvision", seeded(build))


# torch.nn ------------------------------------------------------------------------------------------------------------


def sequences(examples: int, batch_first: bool, length: int = TIME, width: int = WIDTH) -> Tensor:
    x = torch.randn(examples, length, width)
    return x if batch_first else x.transpose(0, 1).contiguous()


def padding(examples: int, length: int = TIME) -> Tensor:
    """True at the padded positions, as torch.nn has it: one fewer real position for every example."""
    real = length - torch.arange(examples) % (length - 1)
    return torch.arange(length) >= real[:, None]


def regression(
    make: Callable[[], nn.Module], inputs: Callable[[int], Any], axes: Mapping[str, int] | None = None
) -> Architecture:
    """A torch.nn module as it is, under a squared error on its (first) output."""

    def build(examples: int) -> Built:
        model, given = make(), inputs(examples)
        args, kwargs = ((), given) if isinstance(given, Mapping) else (given, {})
        with torch.no_grad():
            output = model.eval()(*args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        return model.train(), given, torch.randn_like(output)

    return Architecture("torch.nn", seeded(build), "mse", axes or {})


def encoder(batch_first: bool, norm_first: bool = False) -> Architecture:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=batch_first, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def inputs(examples: int) -> Any:
        return {"src": sequences(examples, batch_first), "src_key_padding_mask": padding(examples)}

    return regression(make, inputs, {} if batch_first else {"src": 1})


def decoder(batch_first: bool) -> Architecture:
    def make() -> nn.Module:
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=batch_first), 1)

    def inputs(examples: int) -> Any:
        return {
            "tgt": sequences(examples, batch_first, 4),
            "memory": sequences(examples, batch_first),
            "tgt_mask": torch.ones(4, 4).triu(1).bool(),
            "tgt_is_causal": True,
        }

    return regression(make, inputs, {} if batch_first else {"tgt": 1, "memory": 1})


class SelfAttention(nn.Module):
    """One tensor as query, key and value, which is what makes torch.nn take its packed path."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)


def self_attention(batch_first: bool) -> Architecture:
    return regression(
        lambda: SelfAttention(batch_first),
        lambda examples: (sequences(examples, batch_first, 4),),
        {} if batch_first else {"0": 1},
    )


def cross_attention(batch_first: bool, kdim: int = WIDTH, vdim: int = WIDTH) -> Architecture:
    """Attention over another sequence, whose keys and values have these widths."""

    def inputs(examples: int) -> Any:
        widths = (kdim, vdim)
        return sequences(examples, batch_first, 4), *(sequences(examples, batch_first, width=w) for w in widths)

    return regression(
        lambda: nn.MultiheadAttention(WIDTH, 2, kdim=kdim, vdim=vdim, batch_first=batch_first),
        inputs,
        {} if batch_first else {"0": 1, "1": 1, "2": 1},
    )


def recurrent(make: Callable[..., nn.Module], batch_first: bool, **options: Any) -> Architecture:
    return regression(
        lambda: make(WIDTH, 6, batch_first=batch_first, **options),
        lambda examples: (sequences(examples, batch_first, 3),),
        {} if batch_first else {"0": 1},
    )


class CellLoop(nn.Module):
    """One cell over time, as people write it who look at every step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        steps = []
        for time in range(x.shape[1]):
            state = self.cell(x[:, time], state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(steps, 1)


def cells(make: Callable[[int, int], nn.Module]) -> Architecture:
    return regression(
        lambda: CellLoop(make(WIDTH, 6)), lambda examples: (sequences(examples, batch_first=True, length=3),)
    )


class BilinearHead(nn.Module):
    """Two projections of one input in an nn.Bilinear."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 5), nn.Bilinear(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(x)), torch.tanh(self.right(x)))


class EinsumAttention(nn.Module):
    """Self-attention with a weight a head, as JAX programs and their ports store it."""

    def __init__(self, heads: int = 2, depth: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(WIDTH, heads, depth) / 3) for _ in range(3))
        self.out = nn.Parameter(torch.randn(heads, depth, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhk->bthk", x, w) for w in (self.query, self.key, self.value))
        scores = torch.einsum("bthk,bshk->bhts", q, k).softmax(-1)
        return torch.einsum("bthk,hkd->btd", torch.einsum("bhts,bshk->bthk", scores, v), self.out)


class Experts(nn.Module):
    """A soft mixture of experts: two batched layers, every token through every expert."""

    def __init__(self, experts: int = 3, hidden: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, hidden) / 3)
        self.up_bias = nn.Parameter(torch.randn(experts, 1, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        hidden = torch.tanh(tokens @ self.up + self.up_bias)  # [experts, tokens, hidden]
        out = torch.bmm(hidden, self.down)
        mixed = torch.einsum("ne,end->nd", self.gate(tokens).softmax(-1), out)
        return mixed.unflatten(0, x.shape[:2])


def plain(make: Callable[[], nn.Module]) -> Architecture:
    return regression(make, lambda examples: (sequences(examples, batch_first=True),))


# Hugging Face --------------------------------------------------------------------------------------------------------


def transformers_package() -> Any:
    """The package; classes are imported when first asked for, so torchvision has to be settled before."""
    torchvision_models()
    with broken_torchvision_hidden():
        import transformers
    return transformers


def hugging_face(name: str, config: str, options: Mapping[str, Any], inputs: Callable[[int], Any]) -> Architecture:
    """A class of transformers by name; targets a class an example, or a word a token for heads that predict words."""
    words = name.endswith(("LMHeadModel", "CausalLM", "MaskedLM", "ConditionalGeneration"))

    def build(examples: int) -> Built:
        package = transformers_package()
        model = getattr(package, name)(getattr(package, config)(**options))
        given = inputs(examples)
        length = given.get("decoder_input_ids", given.get("input_ids"))
        targets = labels(*length.shape, classes=WORDS) if words else labels(examples)
        if words and length is given.get("input_ids"):
            targets = targets.masked_fill(given["attention_mask"] == 0, -100)
        return model, given, targets

    return Architecture("transformers", seeded(build), per_token if words else "cross_entropy")


def text(examples: int) -> dict[str, Tensor]:
    """Token ids and an attention mask with padding at the end; 0 is the padding token."""
    mask = ~padding(examples)
    return {"input_ids": torch.randint(1, WORDS, (examples, TIME)) * mask, "attention_mask": mask.long()}


def pairs(examples: int) -> dict[str, Tensor]:
    return text(examples) | {"decoder_input_ids": torch.randint(1, WORDS, (examples, 4))}


def pixels(examples: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(examples, 3, 16, 16)}


HEADS: dict[str, Any] = {"num_labels": CLASSES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DEPTH: dict[str, Any] = {
    "initializer_range": 0.5,  # the usual 0.02 leaves such narrow models without curvature to speak of
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
GPT2: dict[str, Any] = HEADS | {
    "initializer_range": 0.5,
    "vocab_size": WORDS,
    "n_positions": 8,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 2,
}
BERT: dict[str, Any] = HEADS | DEPTH | {"vocab_size": WORDS, "max_position_embeddings": 8}
LLAMA: dict[str, Any] = BERT | {"num_key_value_heads": 1}
T5: dict[str, Any] = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
VIT: dict[str, Any] = DEPTH | {"image_size": 16, "patch_size": 8, "num_labels": CLASSES}


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": images(resnet18, 32),
    "mobilenet_v2": images(mobilenet_v2, 16),
    "efficientnet_b0": images(efficientnet_b0, 16),
    "convnext_tiny": images(convnext, 16),
    "swin_tiny": images(swin, 16),
    "swin_v2_tiny": images(swin_v2, 16),
    "vision_transformer": images(vision_transformer, 16),
    "transformer_encoder": encoder(batch_first=True),
    "transformer_encoder_norm_first": encoder(batch_first=True, norm_first=True),
    "transformer_encoder_batch_second": encoder(batch_first=False),
    "transformer_decoder": decoder(batch_first=True),
    "transformer_decoder_batch_second": decoder(batch_first=False),
    "attention_self": self_attention(batch_first=True),
    "attention_self_batch_second": self_attention(batch_first=False),
    "attention_cross": cross_attention(batch_first=True),
    "attention_cross_batch_second": cross_attention(batch_first=False),
    "attention_kdim_vdim": cross_attention(batch_first=True, kdim=6, vdim=7),
    "rnn": recurrent(nn.RNN, batch_first=True),
    "rnn_batch_second": recurrent(nn.RNN, batch_first=False, nonlinearity="relu"),
    "gru": recurrent(nn.GRU, batch_first=True, num_layers=2),
    "gru_batch_second": recurrent(nn.GRU, batch_first=False),
    "lstm": recurrent(nn.LSTM, batch_first=True, bidirectional=True),
    "lstm_batch_second": recurrent(nn.LSTM, batch_first=False),
    "lstm_projected": recurrent(nn.LSTM, batch_first=True, proj_size=3),
    "rnn_cell": cells(nn.RNNCell),
    "gru_cell": cells(nn.GRUCell),
    "lstm_cell": cells(nn.LSTMCell),
    "bilinear_head": plain(BilinearHead),
    "einsum_attention": plain(EinsumAttention),
    "experts": plain(Experts),
    "gpt2_lm": hugging_face("GPT2LMHeadModel", "GPT2Config", GPT2, text),
    "gpt2_classifier": hugging_face("GPT2ForSequenceClassification", "GPT2Config", GPT2, text),
    "bert_masked_lm": hugging_face("BertForMaskedLM", "BertConfig", BERT, text),
    "bert_classifier": hugging_face("BertForSequenceClassification", "BertConfig", BERT, text),
    "llama_lm": hugging_face("LlamaForCausalLM", "LlamaConfig", LLAMA, text),
    "llama_classifier": hugging_face("LlamaForSequenceClassification", "LlamaConfig", LLAMA, text),
    "t5": hugging_face("T5ForConditionalGeneration", "T5Config", T5, pairs),
    "vit": hugging_face("ViTForImageClassification", "ViTConfig", VIT, pixels),
}

"""Three small networks trained on scikit-learn's digits, as material for curvscope's first analysis.

The trained bundles (`digits_mlp.pt`, `digits_cnn.pt`, `digits_vit.pt`) lie in this folder;
`python -m sample_models.train` makes them again.
"""

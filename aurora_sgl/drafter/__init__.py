"""The drafter in plain PyTorch: the same arithmetic as SGLang's EAGLE and EAGLE3 models."""

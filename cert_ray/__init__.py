"""CERT (Zan et al., IJCAI 2022) as a Ray system: raw Python files in, a sketch-then-generate server out."""

__version__ = "0.1.0"

"""Fine-tune one language model across organisations that keep their data, with no server in the middle."""

__version__ = "0.1.0"

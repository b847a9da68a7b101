"""The version of minivllm, in one place: setup.cfg and `minivllm --version` read it here."""

__version__ = "0.1.0"

"""VQA: the share of images that vision-language judges answer yes about (Acc_g and Acc_l of UniForget)."""

from .metric import Vqa

__all__ = ["Vqa"]

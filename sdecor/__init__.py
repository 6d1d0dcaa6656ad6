"""SaliencyDecor in small parts: whitening, decorrelation, masking, the joint objective, training and measures.

The method is that of arXiv:2604.25315 as far as its abstract and figure captions tell it; what they leave open is
decided here, and the book that this module belongs to says where.
"""

from __future__ import annotations

from sdecor import _torchvision

__version__ = "0.1.0"

_torchvision.install()

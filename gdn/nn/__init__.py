"""Parameters around operators: the small modules that mixers and models are built from."""

from gdn.nn.conv import ShortConv
from gdn.nn.mlp import SwiGLU
from gdn.nn.norm import GatedRMSNorm, RMSNorm
from gdn.nn.rotary import Rotary

__all__ = ["GatedRMSNorm", "RMSNorm", "Rotary", "ShortConv", "SwiGLU"]

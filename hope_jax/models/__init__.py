"""Language models: Hope and the architectures it is compared with on one skeleton, as pure functions over dicts."""

from .architectures import ARCHITECTURES as ARCHITECTURES
from .build import build as build
from .build import build_lm as build_lm
from .config import ModelConfig as ModelConfig
from .config import check_sequence_length as check_sequence_length
from .functional import functional as functional
from .growing import add_fast_level as add_fast_level
from .llama import load_llama as load_llama
from .lm import LM as LM
from .matryoshka import matryoshka as matryoshka
from .matryoshka import matryoshka_losses as matryoshka_losses
from .matryoshka import prefix_widths as prefix_widths
from .sizing import count_parameters as count_parameters
from .sizing import match_parameters as match_parameters
from .stacking import Pretrained as Pretrained
from .stacking import stack_levels as stack_levels

"""Language models: Hope and the architectures it is compared with on one skeleton, as pure functions over dicts."""

from .architectures import ARCHITECTURES as ARCHITECTURES
from .build import build as build
from .build import build_lm as build_lm
from .config import ModelConfig as ModelConfig
from .config import check_sequence_length as check_sequence_length
from .functional import functional as functional
from .lm import LM as LM
from .sizing import count_parameters as count_parameters
from .sizing import match_parameters as match_parameters

"""tools/evaluate.py: the loss of a saved model is the run's own and that of a loop that shares nothing with it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from engine.data.batches import IGNORE, Batches
from configs.schema import DataConfig, StoreConfig

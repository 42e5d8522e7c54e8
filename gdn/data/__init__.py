"""Text to packed rows: sources, tokenizers, and a loader whose place can be saved."""

from gdn.data.bpe import train_bpe
from gdn.data.config import DataConfig
from gdn.data.loader import Data, Loader, prepare, validation_batches
from gdn.data.pack import Batch
from gdn.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Data",
    "DataConfig",
    "FileTokenizer",
    "Loader",
    "Tokenizer",
    "load_tokenizer",
    "prepare",
    "train_bpe",
    "validation_batches",
]

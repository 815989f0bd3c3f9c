"""Boxes of tensors out of a torch_dist checkpoint, in one process and without a model: what export reads.

torch's own reader does the work; only which part of which tensor is wanted is ours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megacpt.errors import UserError
from megacpt.model.hf.table import checkpoint_key


class StoredTensors:
    """The tensors of one checkpoint folder, by the names that megacpt's tables use.

    Raises:
        UserError: the folder holds no torch_dist checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._reader = FileSystemReader(folder)
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        except Exception as error:
            # The metadata is a pickle: damage shows as any exception.
            raise UserError(f"{folder}: no torch_dist checkpoint, or a damaged one; name an iter_* folder") from error
        self._tensors: dict[str, tuple[str, TensorStorageMetadata]] = {
            checkpoint_key(name): (name, entry)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, layers first where it has layers.

        Raises:
            UserError: the checkpoint does not hold it.
        """
        if key not in self._tensors:
            raise UserError(f"{self.folder}: tensor {key} is missing; the checkpoint is of another model")
        return tuple(self._tensors[key][1].size)

    def dtype(self, key: str) -> torch.dtype:
        """A tensor's dtype."""
        return self._tensors[key][1].properties.dtype

    def read(self, key: str, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """The box that begins at `offsets`, in the stored dtype. Memory: the box and one stored shard.

        Raises:
            UserError: the checkpoint's files are damaged.
        """
        name, entry = self._tensors[key]
        box = torch.empty(tuple(lengths), dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths))
        items = create_read_items_for_chunk_list(name, entry, [wanted])
        try:
            self._reader.read_data(LoadPlan(items), _Box(box)).wait()
        except Exception as error:
            # Stored shards are pickles as well.
            raise UserError(f"{self.folder}: tensor {key} cannot be read; the checkpoint is damaged") from error
        return box


class _Box(LoadPlanner):
    """A planner with one destination."""

    def __init__(self, box: torch.Tensor) -> None:
        self.box = box

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        where = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.box[tuple(slice(offset, offset + length) for offset, length in where)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError

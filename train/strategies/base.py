"""What both context-parallel strategies share: the ranks' grid, the cut of a batch, the shard around every step."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import Trainer
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader

from zoo.errors import UserError
from zoo.layers.dropout import set_streams
from zoo.ops import shard
from zoo.ops.shard import SequenceShard
from zoo.ops.shard.exchange import Message, all_gather
from zoo.ops.shard.sequence_shard import OWN_LAYOUT
from zoo.train.contracts import schema_of
from zoo.train.data.core.base import BATCH, Part
from zoo.train.strategies.batch import LocalBatch, cut, refuse_different
from zoo.train.strategies.kinds import CONTIGUOUS, kinds, refuse_uncuttable
from zoo.train.strategies.ranks import ManyRanks, silent, user_errors
from zoo.train.strategies.settings import CrossingSettings

PARTNER = "lightseq"  # attention beside layers with a state: contiguous stretches, and every rank works alike


def near_the_root(ranks: int) -> int:
    """The largest divisor that is no more than the square root: as many heads' groups as rings, or more rings."""
    return max(d for d in range(1, math.isqrt(ranks) + 1) if ranks % d == 0)


class ContextParallel(ManyRanks):
    """Time cut across the ranks of a group, samples across groups; the rest is the strategy beside it in the bases.

    Ranks form a grid (data, context) whose fastest axis is the context: neighbours share a sequence. Every rank of a
    group must get the same batch, a dict; it is cut here, before it moves to the device, and `zoo.ops.shard` is set
    around each step, so that neither model nor task knows of ranks. With one rank a group nothing is cut.
    """

    def _configure(self, settings: CrossingSettings) -> None:
        """Keep what both constructors take."""
        self.settings = settings
        self._inner = settings.inner  # of "usp"; chosen with the grid where it is left out
        self._mesh: DeviceMesh | None = None
        self._place: SequenceShard | None = None
        self._compared: set[str] = set()  # stages whose first batch was compared in the group
        self._watched: set[str] = set()  # stages whose first step was seen to cross ranks

    # -- the grid of ranks --------------------------------------------------------------------------------------

    @property
    def cp_size(self) -> int:
        """Ranks that share a sequence."""
        return self.settings.cp_size or self.world_size

    @property
    def dp_size(self) -> int:
        """Groups of ranks with different data."""
        return self.world_size // self.cp_size

    @property
    def layout(self) -> str:
        """Which tokens a rank holds, see SequenceShard; contiguous where nothing is cut."""
        own = OWN_LAYOUT.get(self._attention, "contiguous")
        return "contiguous" if self.cp_size == 1 else self.settings.layout or own

    @property
    def _attention(self) -> str:
        """How softmax attention crosses ranks."""
        return self.settings.attention or PARTNER

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Data differ between groups, not inside one."""
        return {"num_replicas": self.dp_size, "rank": self.global_rank // self.cp_size}

    def _configure_launcher(self) -> None:
        if self.world_size % self.cp_size:
            raise UserError(
                f"strategy.cp_size must divide the {self.world_size} ranks (trainer.devices x trainer.num_nodes); got "
                f"{self.cp_size}, choose a divisor"
            )
        inner = self.settings.inner
        if inner is not None and (inner < 1 or self.cp_size % inner):
            raise UserError(f"strategy.inner must divide strategy.cp_size = {self.cp_size}; got {inner}")
        super()._configure_launcher()

    def _make_grid(self, names: tuple[str, str]) -> DeviceMesh:
        """The mesh of (data, context) ranks; its context groups are used once, since the first message opens them."""
        mesh = init_device_mesh(self.root_device.type, (self.dp_size, self.cp_size), mesh_dim_names=names)
        self._mesh = mesh
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = mesh
        if self.cp_size > 1:
            settings = self.settings
            if self._attention == "usp" and self._inner is None:
                self._inner = near_the_root(self.cp_size)
            self._place = SequenceShard(
                mesh[names[1]].get_group(), method=settings.method, attention=self._attention, layout=settings.layout,
                link=settings.link, blocks=settings.blocks, inner=self._inner,
            )  # fmt: skip
            all_gather(self._place, torch.zeros(1, device=self.root_device))
        return mesh

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model whose time cannot be cut; groups with different data drop different numbers."""
        assert self.lightning_module is not None
        set_streams(self.lightning_module, self.distributed_sampler_kwargs["rank"])
        if self._place is not None:
            refuse_uncuttable(self.lightning_module, self._place.layout or "contiguous")
            self._tell_partner()
        super().setup(trainer)

    def _tell_partner(self) -> None:
        assert self.lightning_module is not None
        crossings = set(kinds(self.lightning_module))
        if (
            "attention" in crossings
            and CONTIGUOUS & crossings
            and self.settings.attention is None
            and self.is_global_zero
        ):
            warnings.warn(
                f"a hybrid of attention and layers with a state: its attention crosses ranks by {PARTNER}, whose "
                "stretches are contiguous and whose work is even; attention= chooses another",
                stacklevel=2,
            )

    def teardown(self) -> None:
        """Give the groups of the grid back."""
        super().teardown()
        self._give_back()

    def _give_back(self) -> None:
        mesh, self._mesh, self._place = self._mesh, None, None
        self._compared.clear()
        self._watched.clear()
        if mesh is None or not dist.is_initialized():
            return
        if self.lightning_module is not None:
            self.lightning_module._device_mesh = None
        for group in mesh.get_all_groups():
            if group is not dist.group.WORLD:
                with suppress(ValueError, RuntimeError):  # a group that a lost rank has broken, or that is gone
                    dist.destroy_process_group(group)

    # -- batches ------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: Any) -> Any:
        """Workers that draw at random do so alike in a group: they are seeded by the rank of the data."""
        loader = super().process_dataloader(dataloader)
        if isinstance(loader, DataLoader) and loader.worker_init_fn is None:
            loader.worker_init_fn = partial(pl_worker_init_function, rank=self.distributed_sampler_kwargs["rank"])
        return loader

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Cut the batch, then move the rank's part."""
        if self._place is None or isinstance(batch, LocalBatch):
            return super().batch_to_device(batch, device, dataloader_idx)
        stage = self._stage()
        with self._clear_errors():
            if stage not in self._compared:
                refuse_different(batch, self._place, self.root_device)
                self._compared.add(stage)
        part = cut(batch, self._known_schema(), self._place)
        moved = LocalBatch(super().batch_to_device(dict(part), device, dataloader_idx))
        moved.place = part.place
        return moved

    def _known_schema(self) -> Mapping[str, Part]:
        if self.settings.schema is not None:
            return self.settings.schema
        trainer = None if self.lightning_module is None else self.lightning_module._trainer
        data = None if trainer is None else trainer.datamodule  # type: ignore[attr-defined]
        known = schema_of(data)
        return BATCH if known is None else known

    # -- steps --------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The task's, on the rank's stretch of time."""
        with self._stretch_of(args):
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The task's, on the rank's stretch of time."""
        with self._stretch_of(args):
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The task's, on the rank's stretch of time."""
        with self._stretch_of(args):
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The task's, on the rank's stretch of time."""
        with self._stretch_of(args):
            return super().predict_step(*args, **kwargs)

    @contextmanager
    def _stretch_of(self, args: tuple[Any, ...]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._clear_errors())
            if self._place is None:
                yield
                return
            place = next((batch.place for batch in args if isinstance(batch, LocalBatch)), None)
            if place is None:
                raise UserError(
                    "context parallelism cuts the batches that Lightning hands to a step; this step takes the loader's "
                    "iterator, take batch and batch_idx instead"
                )
            stage = self._stage()
            if stage in self._watched:
                with shard.use(place):
                    yield
                return
            messages: list[Message] = []
            with user_errors(), shard.use(place), shard.observed(messages.append):
                yield
            own = torch.tensor([len(messages)], device=self.root_device)
            if not any(int(x) for x in all_gather(place, own)):
                raise silent(place.size)
            self._watched.add(stage)

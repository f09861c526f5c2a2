"""What both balanced strategies share: a batch is one update's plan, run micro-step by micro-step.

    Trainer(strategy="balanced", devices=4).fit(task, datamodule=TextDocuments(path="corpus"))

Every micro-step is one call of the task inside its ring's shard, followed at once by its backward pass; ranks meet in
rings, by messages between pairs, and once at the end, where the gradients are summed.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from zoo.errors import UserError
from zoo.layers.dropout import set_streams
from zoo.ops import shard
from zoo.ops.shard import SequenceShard
from zoo.ops.shard.exchange import Message
from zoo.train.balance import CostModel, Flexible, Hybrid, PackedStream, Planner, Uniform
from zoo.train.balance.plan import RankStep
from zoo.train.contracts import model_of
from zoo.train.data.core.planned import PlanBatch
from zoo.train.strategies.kinds import kinds, refuse_uncuttable, refuse_undeclared
from zoo.train.strategies.nominal import nominal
from zoo.train.strategies.ranks import ManyRanks, silent, user_errors
from zoo.train.strategies.settings import PlanSettings

__all__ = ["Balanced", "Local"]

ROOM = 2  # the default capacity of a rank, in shares of a batch

Batch = dict[str, Tensor]


class Local(list[tuple[RankStep, SequenceShard | None, Batch]]):
    """A rank's micro-batches on its device, each with its place in a ring; None where it is alone.

    most: tokens of the largest micro-batch of any rank.
    """

    most: int


class Balanced(ManyRanks):
    """Runs plans; the rest is the strategy beside it in the bases."""

    lockstep: ClassVar[bool]

    def _configure(self, settings: PlanSettings) -> None:
        """Check and keep what both constructors take."""
        if settings.planner == "hybrid" and self.lockstep:
            raise UserError(
                "strategy.planner=hybrid gives ranks unequal numbers of micro-steps, and cut weights are gathered by "
                "all ranks in each; use flexible, or strategy=balanced"
            )
        self.settings = settings
        self._compared: set[str] = set()  # stages whose first batch was compared on all ranks
        self._watched: set[str] = set()  # stages in which rings were seen to exchange something
        self._messages = self._rings = 0  # of a stage that is not watched yet
        self._gradients: list[Tensor | None] | None = None  # of the micro-steps before the last
        self._holding = False  # further batches add to this update

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank has a part of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def dp_size(self) -> int:
        """Batches that ranks see side by side: all ranks share one."""
        return 1

    # -- plans --------------------------------------------------------------------------------------------------

    def planner_of(self, longest: int, global_tokens: int) -> Planner:
        """The planner of data whose longest document and whose batches have so many tokens.

        Raises:
            UserError: the settings do not go together.
        """
        ranks, chunk = self.world_size, self.settings.chunk
        kind = self.planner
        most = 1 << ranks.bit_length() - 1 if kind in ("flexible", "uniform") else ranks  # ranks of a ring
        room = self.settings.capacity or max(-(-ROOM * global_tokens // ranks), -(-longest // most))
        if self.settings.capacity is None:
            room = -(-room // chunk) * chunk
        if room < chunk:
            raise UserError(f"strategy.capacity must have room for a chunk of {chunk} tokens; got {room}")
        if kind == "packed":
            return PackedStream(ranks, room, chunk=chunk)
        cost = self.cost(room)
        if kind == "hybrid":
            return Hybrid(ranks, cost, chunk=chunk)
        return (Uniform if kind == "uniform" else Flexible)(ranks, cost, chunk=chunk)

    @property
    def planner(self) -> str:
        """The planner's name; "auto" is decided by the model."""
        if self.settings.planner != "auto":
            return self.settings.planner
        assert self.lightning_module is not None
        if "attention" not in kinds(self.lightning_module):
            return "packed"
        return "flexible" if self.lockstep else "hybrid"

    def cost(self, capacity: int) -> CostModel:
        """What planners assume of this model; `zoo.train.balance.refit` fits it to measured steps."""
        assert self.lightning_module is not None
        model = self.lightning_module
        planner = (
            replace(self.settings.cost, capacity=capacity) if self.settings.cost else nominal(model_of(model), capacity)
        )
        try:
            return replace(planner, **self.settings.coefficients)
        except ValueError as error:
            raise UserError(f"strategy: {error}") from error

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model whose time cannot be cut, or whose past is not all that it sees."""
        module = self.lightning_module
        assert module is not None
        if not module.automatic_optimization:
            raise UserError(
                "balanced strategies run the backward passes of a batch themselves, so they need automatic optimisation"
            )
        if not getattr(model_of(module), "causal", True):
            raise UserError("balanced plans cut time for causal models, and this one sees both sides; use zeco or ddp")
        refuse_uncuttable(module, "contiguous")
        if self.settings.chunk > 1 and "attention" in kinds(module):
            raise UserError(
                f"attention crosses ranks where every rank holds an even share of a ring's tokens; got "
                f"strategy.chunk={self.settings.chunk}, use 1"
            )
        set_streams(module, self.global_rank)
        super().setup(trainer)

    def _meet(self) -> None:
        """The first message of all ranks, which opens the group that messages between pairs use."""
        with self._clear_errors():
            dist.all_reduce(torch.zeros(1, device=self.root_device))

    def teardown(self) -> None:
        """Forget what this run compared and watched, and its gradients."""
        super().teardown()
        self._compared.clear()
        self._watched.clear()
        self._gradients, self._holding = None, False

    # -- batches ------------------------------------------------------------------------------------------------

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Compare a stage's first plan on all ranks; move the micro-batches, each with its place."""
        if not isinstance(batch, PlanBatch):
            raise UserError(
                "a balanced strategy runs plans of whole documents, and these data make ordinary batches; use "
                "data=documents (zoo.train.data.text.documents), or a strategy such as ddp or zeco"
            )
        stage = self._stage()
        if stage not in self._compared:
            self._refuse_different(batch)
            self._compared.add(stage)
        moved = Local()
        moved.most = batch.most
        for step, part in batch.micro_batches:
            moved.append((step, self._place(step), super().batch_to_device(part, device, dataloader_idx)))
        return moved

    def _place(self, step: RankStep) -> SequenceShard | None:
        if len(step.ring) == 1:
            return None
        return SequenceShard(
            ranks=step.ring,
            method=self.settings.method,
            attention=self.settings.attention,
            length=step.stream[-1],
            chunk=self.settings.chunk,
            documents=step.stream,
        )

    def _refuse_different(self, batch: PlanBatch) -> None:
        """Raise on every rank where they hold different plans or documents: rings would wait for ever."""
        settings = hash_of(self.settings.method, self.settings.attention, self.trainer.accumulate_grad_batches)
        own = torch.tensor([batch.digest ^ settings], device=self.root_device)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        with self._clear_errors():
            dist.all_gather(everyone, own)
        digests = [int(x) for x in everyone]
        other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if other:
            raise UserError(
                f"all {self.world_size} ranks must make the same plan of the same documents; ranks {other} made "
                "another than rank 0: give all ranks the same documents, settings, seed and versions"
            )

    @property
    def trainer(self) -> Trainer:
        """The trainer of the module that the strategy runs."""
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # -- steps --------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int, *args: Any) -> Any:
        """All micro-steps but for the last one's backward pass. The loss is the sum of all, the gradient the last's."""
        with self._clear_errors(), self._draws() as draw:
            self._begin(batch_idx)
            weights = next(iter(self._parameters())).dtype
            # of one dtype on all ranks, those without work included: callbacks may sum losses over them
            total = torch.zeros((), dtype=torch.promote_types(weights, torch.float32), device=self.root_device)
            outputs = None
            for i, (step, place, part) in enumerate(batch):
                last = i == len(batch) - 1
                self._before_micro_step(last)
                draw(step)
                with self._inside(place):
                    outputs = super().training_step(part, batch_idx, *args)
                loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
                if not isinstance(loss, Tensor):
                    raise UserError("under a balanced strategy every training_step returns its loss")
                total = total + (loss if last else loss.detach()).to(total.dtype)
                if not last:
                    self._backward(loss / self.trainer.accumulate_grad_batches)
            if outputs is None:  # no work in this update: nothing but the sum of the gradients is left
                total.requires_grad_()
            self._keep()
        return {**outputs, "loss": total} if isinstance(outputs, Mapping) else total

    def validation_step(self, batch: Any, *args: Any) -> Any:
        """The task's, on each micro-batch; nothing is returned."""
        self._evaluate(super().validation_step, batch, args)

    def test_step(self, batch: Any, *args: Any) -> Any:
        """The task's, on each micro-batch; nothing is returned."""
        self._evaluate(super().test_step, batch, args)

    def predict_step(self, batch: Any, *args: Any) -> Any:
        """A list of what the task returns for this rank's micro-batches."""
        return self._evaluate(super().predict_step, batch, args)

    def _evaluate(self, run: Any, batch: Local, args: tuple[Any, ...]) -> list[Any]:
        results = []
        with self._clear_errors():
            for _, place, part in batch:
                with self._inside(place):
                    results.append(run(part, *args))
            self._refuse_silent()
        return results

    @contextmanager
    def _inside(self, place: SequenceShard | None) -> Iterator[None]:
        if self._stage() in self._watched:
            with shard.use(place):
                yield
            return
        messages: list[Message] = []
        assert self.lightning_module is not None
        undeclared = refuse_undeclared(self.lightning_module, ["attention"])  # whose work is planned for
        with user_errors(), undeclared, shard.use(place), shard.observed(messages.append):
            yield
        self._messages += len(messages)
        self._rings += place is not None

    def _refuse_silent(self) -> None:
        """After the last message of a batch: the first rings of a stage must have exchanged something."""
        stage = self._stage()
        if stage in self._watched:
            return
        own = torch.tensor([self._messages, self._rings], device=self.root_device)
        dist.all_reduce(own)
        messages, rings = own.tolist()
        self._messages = self._rings = 0
        if rings and not messages:
            raise silent(self.world_size)
        if rings:
            self._watched.add(stage)

    @contextmanager
    def _draws(self) -> Iterator[Any]:
        """Dropout draws by the batch and the micro-step, so that ranks with more of them leave no other generator."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        after = torch.get_rng_state()
        try:
            yield lambda step: torch.default_generator.manual_seed(hash_of(seed, step.step))
        finally:
            torch.set_rng_state(after)

    # -- gradients ----------------------------------------------------------------------------------------------

    def _begin(self, batch_idx: int) -> None:
        """Before the first micro-step."""
        raise NotImplementedError

    def _before_micro_step(self, last: bool) -> None:
        raise NotImplementedError

    def _keep(self) -> None:
        """After the last micro-step's forward pass; Lightning clears gradients next, and those so far must stay."""
        raise NotImplementedError

    def _finish(self) -> None:
        """After the last backward pass of an update, when all ranks have sent all messages."""
        raise NotImplementedError

    def _backward(self, loss: Tensor) -> None:
        """As Lightning's, without the end of the update."""
        assert self.lightning_module is not None
        module = self.lightning_module
        loss = self.precision_plugin.pre_backward(loss, module)
        self.precision_plugin.backward(loss, module, None)
        self.precision_plugin.post_backward(loss, module)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The last micro-step's, then the sum of all ranks' gradients where the update is complete.

        Lightning's on_after_backward sees the rank's own gradients, on_before_optimizer_step those of all.
        """
        with self._clear_errors():
            if self._gradients is not None:
                for p, kept in zip(self._parameters(), self._gradients, strict=True):
                    p.grad = kept
                self._gradients = None
            loss = super().backward(closure_loss, *args, **kwargs)
            self._refuse_silent()
            if not self._holding:
                self._finish()
        return loss

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, further batches follow before the update."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def _parameters(self) -> list[torch.nn.Parameter]:
        assert self.lightning_module is not None
        return [p for p in self.lightning_module.parameters() if p.requires_grad]


def hash_of(*words: Any) -> int:
    """60 bits of a hash that all processes agree on."""
    return int(hashlib.sha256(repr(words).encode()).hexdigest()[:15], 16)

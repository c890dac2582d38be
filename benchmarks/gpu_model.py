"""The time of a decoded byte on a GPU, predicted: a model, of which nothing is measured.

A byte is a chain of phases (kernels, or parts of one). A phase begins when the one before it has
ended, fetches activations from L2, multiplies the weights that have arrived, and ends. Meanwhile
memory sends weights in their order: to L2 as far ahead of the phase as the design has them
prefetched, and from there to the multiprocessors as far ahead as these have room. `simulate` plays
this for the bytes of a patch; memory idles where it may not run ahead.

    python benchmarks/gpu_model.py

docs/gpu.md explains the numbers. Whoever measures one changes it here.
"""

from dataclasses import dataclass, replace

from decode import MODELS, config_of

from mblm import MambaBlock, MBLMModelConfig, TransformerBlock

US = 1e-6
WEIGHT = 2  # bytes, bfloat16
FLOAT = 4
PIECE = 1 << 20  # bytes that memory sends at a time
FEW_ROWS = 8  # more are multiplied 32 at a time
ATTENDING_ROWS = 4  # of more, attention is a kernel
UPPER_POSITIONS = 64  # in the cache of a global Transformer


@dataclass(frozen=True)
class Device:
    """What is assumed of a GPU."""

    name: str
    bandwidth: float  # bytes/s of memory, as a large copy reaches them: 0.9 of the data sheet's
    l2_bandwidth: float = 5.5e12
    processors: int = 132
    processor_bandwidth: float = 110e9  # from L2 to one multiprocessor
    trip: float = 0.2 * US  # to L2 and back, with others underway
    memory_trip: float = 0.5 * US  # until the first bytes arrive where memory was idle
    end: float = 0.3 * US  # sums over a warp and a block, and the store of the result


DEVICES = [Device("H200", 0.9 * 4.8e12), Device("H100", 0.9 * 3.35e12)]


@dataclass(frozen=True)
class Design:
    """How phases follow each other, and how far memory may run ahead of them."""

    name: str
    link: float  # from the end of a phase to the first load of its result
    ahead: float  # bytes of weights on their way to registers or shared memory
    prefetched: float = 0  # bytes of weights in L2
    loads_together: bool = True  # activations in one trip, instead of one trip each
    is_fused: bool = False  # attention in the next product, norms and embeddings in neighbors
    sampling: float = 1.5 * US
    columns: int = 32  # of a block of many rows; of wide ones, a cluster shares out the inputs


BLOCKS_AHEAD = 132 * 32e3  # one block of the next kernel in every multiprocessor
DESIGNS = [
    Design("kernels in a graph", 1.3 * US, 0, loads_together=False, sampling=10 * US),
    Design("dependent launches", 0.8 * US, BLOCKS_AHEAD, loads_together=False, sampling=10 * US),
    Design("loads together", 0.8 * US, BLOCKS_AHEAD),
    Design("four phases", 0.8 * US, BLOCKS_AHEAD, is_fused=True, columns=128),
    Design("four phases, L2 prefetch", 0.8 * US, BLOCKS_AHEAD, 24e6, is_fused=True, columns=128),
    Design("one persistent kernel", 0.7 * US, 132 * 160e3, is_fused=True, columns=128),
]


@dataclass(frozen=True)
class Phase:
    bytes: float = 0  # of weights and states, read from memory or written
    trips: int = 1  # to L2, one after the other
    fetched: float = 0  # bytes of activations that all blocks together fetch from L2
    blocks: int = 1
    seconds: float = 0  # of anything else that goes on one after the other


class Phases:
    """The phases of a model's patch under a design, for so many rows."""

    def __init__(self, config: MBLMModelConfig, design: Design, rows: int) -> None:
        self.config, self.design, self.rows = config, design, rows

    def product(self, inputs: int, outputs: int, extra_trips: int = 0) -> Phase:
        is_many = self.rows > FEW_ROWS
        few = 16 if self.design.columns > 32 and outputs >= 2048 else 8
        columns = min(self.design.columns, 128 if outputs >= 1024 else 16) if is_many else few
        blocks = -(-outputs // columns)
        trips = 1
        if not self.design.loads_together:
            trips += inputs // 256 if self.rows <= FEW_ROWS else inputs // 128
        fetched = blocks * self.rows * inputs * FLOAT
        if columns > 32:  # blocks of 32 rows
            passes = -(-self.rows // 32)
            fetched += (passes - 1) * inputs * outputs * WEIGHT
            blocks *= passes * min(8, 144 // blocks)
        return Phase(inputs * outputs * WEIGHT, trips + extra_trips, fetched, blocks)

    def small(self, trips: int, seconds: float = 0) -> Phase:
        """A kernel with hardly any weights: a norm, an embedding, a choice."""
        return Phase(trips=trips, seconds=seconds, blocks=self.rows)

    def transformer_layer(self, block: TransformerBlock, dim: int, positions: int) -> list[Phase]:
        width, inner = block.attn_head_dims * block.attn_num_heads, block.ff_multiplier * dim
        cached = self.rows * positions * 2 * width * FLOAT
        heads = self.product(dim, 3 * width)
        attention = Phase(cached, 6, blocks=self.rows * block.attn_num_heads)
        out = self.product(width, dim)
        if self.design.is_fused and self.rows <= ATTENDING_ROWS:
            # Every cluster of the next product attends for itself.
            clusters = max(1, out.blocks // 8)
            trips = out.trips + 5
            attended = [replace(out, trips=trips, fetched=cached * clusters)]
        else:
            attended = [attention, out]
        return [heads, *attended, self.product(dim, inner), self.product(inner, dim)]

    def mamba_layer(self, block: MambaBlock, dim: int) -> list[Phase]:
        inner = block.expand * dim
        state = 2 * self.rows * inner * block.d_state * FLOAT
        scan = Phase(state, 3, blocks=self.rows * inner // block.headdim)
        out = self.product(inner, dim)
        if block.block_type == "mamba1":
            to_parameters = self.product(inner, -(-dim // 16) + 2 * block.d_state)
            return [self.product(dim, 2 * inner), to_parameters, scan, out]
        projected = 2 * inner + 2 * block.d_state + inner // block.headdim
        return [self.product(dim, projected), scan, out]

    def stage(self, n: int) -> list[Phase]:
        config = self.config
        block, dim = config.stage_blocks()[n], config.hidden_dims[n]
        is_local = n + 1 == len(config.seq_lens)
        phases: list[Phase] = []
        for _ in range(config.num_layers[n]):
            if isinstance(block, TransformerBlock):
                positions = 2 + config.seq_lens[n] // 2 if is_local else UPPER_POSITIONS
                phases += self.transformer_layer(block, dim, positions)
            elif isinstance(block, MambaBlock):
                phases += self.mamba_layer(block, dim)
            else:
                raise TypeError(f"a stage is a Transformer or a Mamba, got {type(block).__name__}")
        has_norm = getattr(block, "block_type", "") != "mamba1"
        return phases + [self.small(4)] * (has_norm and not self.design.is_fused)

    def byte(self) -> list[Phase]:
        embed, choose = self.small(3), self.small(3, self.design.sampling)
        logits = self.product(self.config.hidden_dims[-1], self.config.num_tokens)
        first = [] if self.design.is_fused else [embed]  # else done where the byte was chosen
        return [*first, *self.stage(len(self.config.seq_lens) - 1), logits, choose]

    def upper(self, n: int) -> list[Phase]:
        """What stage n does when a patch is complete, and the stage below begins anew."""
        dims, seq_lens = self.config.hidden_dims, self.config.seq_lens
        patch = 1
        for length in seq_lens[n + 1 :]:
            patch *= length
        project = self.product(patch * dims[-1], dims[n])
        context = self.product(dims[n], dims[n + 1] * seq_lens[n + 1])
        small = self.small(4)
        placing = [small, project] if self.design.is_fused else [small, project, small]
        begins = [context] if self.design.is_fused else [context, small]
        return [*placing, *self.stage(n), *begins]

    def patch(self) -> list[Phase]:
        """A patch of the local stage, and the step of the stage above."""
        turn = [self.small(2)] * (1 if self.design.is_fused else 2)
        upper = self.upper(len(self.config.seq_lens) - 2)
        return [*turn, *upper, *self.byte() * self.config.seq_lens[-1]]


class Stream:
    """Weights on their way in their order, a piece of them at most ``window`` bytes ahead."""

    def __init__(self, window: float, bandwidth: float, trip: float) -> None:
        self.window, self.bandwidth, self.trip = window, bandwidth, trip
        self.free = 0.0
        self.near = 0  # the first phase that the last piece is near enough to

    def send(
        self, size: float, end: float, begins: list[tuple[float, float]], there: float
    ) -> float:
        """When a piece arrives that ends at a byte and can leave from ``there`` on."""
        while self.near < len(begins) - 1 and end - begins[self.near][1] > self.window:
            self.near += 1
        leaves = max(there, begins[self.near][0])
        if leaves > self.free:
            self.free = leaves + self.trip
        self.free += size / self.bandwidth
        return self.free


def simulate(phases: list[Phase], device: Device, design: Design) -> float:
    """Seconds that the phases take when they are repeated."""
    begins: list[tuple[float, float]] = []  # when each phase began, and at which byte
    to_l2 = Stream(max(design.prefetched, design.ahead), device.bandwidth, device.memory_trip)
    to_processors = Stream(design.ahead, device.l2_bandwidth, 0)
    ends = [0.0]
    now = sent = 0.0
    for _ in range(2):  # the second time, memory was ahead when it began
        for phase in phases:
            begins.append((now, sent))
            rate = min(device.l2_bandwidth, phase.blocks * device.processor_bandwidth)
            now += design.link + phase.trips * device.trip + phase.seconds + phase.fetched / rate
            for first in range(0, int(phase.bytes), PIECE):
                size = min(PIECE, phase.bytes - first)
                sent += size
                arrived = to_l2.send(size, sent, begins, 0)
                arrived = to_processors.send(size, sent, begins, arrived)
                now = max(now, arrived)
            now += device.end
        ends.append(now)
    return ends[-1] - ends[-2]


def predict(config: MBLMModelConfig, device: Device, design: Design, rows: int) -> dict[str, float]:
    """Of a byte of every row: phases, seconds, those of the floor and the fraction reached."""
    phases = Phases(config, design, rows).patch()
    patch = config.seq_lens[-1]
    seconds = simulate(phases, device, design) / patch
    floor = sum(p.bytes for p in phases) / device.bandwidth / patch
    return {
        "phases": len(phases) / patch,
        "seconds": seconds,
        "floor": floor,
        "fraction": floor / seconds,
    }


MODELS_SHOWN = {
    "quickstart": "quickstart, Transformer/Transformer",
    "published 2D": "published 2D, 25 Mamba-2 + 21 Transformer",
}


def table(rows: int) -> str:
    """Predicted phases, time and fraction of the floor on each device, as docs/gpu.md shows it."""
    columns = [f"{model}, {device.name}" for model in MODELS_SHOWN for device in DEVICES]
    lines = [f"| {rows} row{'s' * (rows > 1)} | {' | '.join(columns)} |", "|---" * 5 + "|"]
    for design in DESIGNS:
        cells = []
        for model in MODELS_SHOWN.values():
            for device in DEVICES:
                figures = predict(config_of(*MODELS[model]), device, design, rows)
                cells.append(f"{figures['fraction']:.2f} ({figures['seconds'] / US:.0f} us)")
        lines.append(f"| {design.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("Predicted, not measured: the fraction of the floor, and microseconds for a byte\n")
    print(table(1), table(64), sep="\n\n")

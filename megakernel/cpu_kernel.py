"""The frame as machine code for the CPU at hand, made by numba: weights and the rows' state in, a frame's codes out.

One call is a whole frame: talker, head, sampling, code predictor, feedback. It does not hold the GIL: an event loop in
the same process is not kept waiting. With more than one thread every thread makes the same call and does its share of
each phase; between phases they wait for each other at `_meet`. The order of every sum depends on the model's sizes
alone: a voice's bits depend neither on its company nor on the number of threads.

All of it is in one file, since numba's cache looks for changes in the file of the called function alone. Arithmetic is
fp32. Matrices are panels of 64 outputs, [panels, K, 64], bf16 (as uint16) or fp32. Letters: README.md.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic

PANEL, LANES = 64, 16
"""Outputs that are summed side by side in registers, and floats of one vector (of any CPU: LLVM cuts it to size)."""

HALF = PANEL // 2
"""A panel of gate_up holds so many gates and, behind them, their ups."""

SUMS_OF = 32
"""megakernel.sampler.BLOCK"""

SPINS = 4000
"""Looks at the meeting point before a thread that waits offers its core to others."""


class Stack(NamedTuple):
    """A transformer stack: matrices [L, panels, K, 64], norms [L, ...] fp32, rope [2, positions, D] of rope_table.

    gate_up's panel p holds gates 32 p .. 32 p + 31 and then the ups of the same numbers.
    """

    input_norm: np.ndarray
    qkv: np.ndarray
    qk_norm: np.ndarray
    o: np.ndarray
    post_norm: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    norm: np.ndarray
    rope: np.ndarray
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


class Frame(NamedTuple):
    """What a frame reads beside the stacks: reference.FrameWeights, the matrices as panels.

    projection, bias  [0, ...] where nothing is projected
    """

    codec_head: np.ndarray
    heads: np.ndarray
    embeddings: np.ndarray
    inputs: np.ndarray
    projection: np.ndarray
    bias: np.ndarray
    vocab: int
    eos: int
    suppress_from: int


class State(NamedTuple):
    """The rows: kv [L, 2, S, kv_heads, P, D], pending [S, H], history [S, V] bool, done [S] bool.

    predictor_kv  [L, 2, columns, kv_heads, C, D]
    """

    kv: np.ndarray
    predictor_kv: np.ndarray
    pending: np.ndarray
    history: np.ndarray
    done: np.ndarray


class Columns(NamedTuple):
    """The n voices of a step: row, position, text [n, H], uniform [n, C], early [n] (too early to end).

    knobs [n, 2, 4]: (do_sample, temperature, top_k or 0, 1 - top_p) of code 0 and of the others; penalty [n]
    """

    row: np.ndarray
    position: np.ndarray
    text: np.ndarray
    uniform: np.ndarray
    early: np.ndarray
    knobs: np.ndarray
    penalty: np.ndarray


class Scratch(NamedTuple):
    """Room for M vectors; those with a first dimension of threads belong to one thread each."""

    x: np.ndarray
    normed: np.ndarray
    y: np.ndarray
    z: np.ndarray
    gated: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    sums: np.ndarray
    order: np.ndarray
    row: np.ndarray
    at: np.ndarray
    arrived: np.ndarray
    met: np.ndarray


def _compiled(function: Callable[..., Any], fastmath: set[str]) -> Callable[..., Any]:
    make = partial(njit, fastmath=fastmath, nogil=True, error_model="numpy", boundscheck=False)
    try:
        return make(cache=True)(function)
    except RuntimeError:  # no folder to keep machine code in
        return make()(function)


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile; sums in the order as written, products fused into them."""
    return _compiled(function, {"contract"})


def reordered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile; sums in an order that the compiler chooses once, for speed."""
    return _compiled(function, {"contract", "reassoc", "nsz"})


@intrinsic
def _wide(context: Any, x: Any) -> Any:
    """An element of a bf16 (as uint16) or fp32 array as float32."""

    def make(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _widened(builder, values[0], ir.FloatType(), ir.IntType(32), 16)

    return types.float32(x), make


def _widened(builder: Any, value: Any, floats: Any, ints: Any, shift: Any) -> Any:
    if isinstance(getattr(value.type, "element", value.type), ir.FloatType):
        return value
    return builder.bitcast(builder.shl(builder.zext(value, ints), ir.Constant(ints, shift)), floats)


def _product(rows: int) -> Callable[..., None]:
    """One panel times `rows` vectors, 64 sums a vector in registers; with `adds` they are added to what y holds.

    x [rows, x_stride] from x_at on, w [K, 64] from w_at on -> y [rows, y_stride] from y_at on; k in order.
    """

    @intrinsic
    def product(
        context: Any,
        x: Any,
        x_at: Any,
        x_stride: Any,
        w: Any,
        w_at: Any,
        size: Any,
        y: Any,
        y_at: Any,
        y_stride: Any,
        adds: Any,
    ) -> Any:
        places = (types.intp, types.intp)
        signature = types.void(x, *places, w, *places, y, *places, types.boolean)

        def make(context: Any, b: Any, signature: Any, values: Any) -> Any:
            x, x_at, x_stride, w, w_at, size, y, y_at, y_stride, adds = values
            arrays = signature.args
            x, w, y = (context.make_array(arrays[i])(context, b, values[i]).data for i in (0, 3, 6))
            i64, i32, f32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
            floats, ints = ir.VectorType(f32, LANES), ir.VectorType(i32, LANES)
            stored = floats if arrays[3].dtype == types.float32 else ir.VectorType(ir.IntType(16), LANES)
            fma = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{LANES}f32"
            )
            some, zeros = ir.Constant(floats, ir.Undefined), ir.Constant(floats, [0.0] * LANES)
            parts = range(PANEL // LANES)

            def at(base: Any, index: Any, kind: Any) -> Any:
                return b.bitcast(b.gep(base, [index]), kind.as_pointer())

            before, loop, after = b.block, b.append_basic_block("k"), b.append_basic_block("sums")
            b.branch(loop)
            b.position_at_end(loop)
            k = b.phi(i64)
            sums = [[b.phi(floats) for _ in parts] for _ in range(rows)]
            spread = []
            for r in range(rows):
                one = b.load(b.gep(x, [b.add(b.add(x_at, b.mul(i64(r), x_stride)), k)]))
                spread.append(
                    b.shuffle_vector(b.insert_element(some, one, i32(0)), some, ir.Constant(ints, [0] * LANES))
                )
            offset = b.add(w_at, b.mul(k, i64(PANEL)))
            new: list[list[Any]] = [[] for _ in range(rows)]
            for part in parts:
                raw = b.load(at(w, b.add(offset, i64(part * LANES)), stored))
                raw.align = 2
                wide = _widened(b, raw, floats, ints, [16] * LANES)
                for r in range(rows):
                    new[r].append(b.call(fma, [spread[r], wide, sums[r][part]]))
            following = b.add(k, i64(1))
            b.cbranch(b.icmp_signed("<", following, size), loop, after)
            k.add_incoming(i64(0), before)
            k.add_incoming(following, loop)
            for r in range(rows):
                for part in parts:
                    sums[r][part].add_incoming(zeros, before)
                    sums[r][part].add_incoming(new[r][part], loop)
            b.position_at_end(after)
            for r in range(rows):
                for part in parts:
                    place = at(y, b.add(b.add(y_at, b.mul(i64(r), y_stride)), i64(part * LANES)), floats)
                    held = b.load(place)
                    held.align = 4
                    b.store(b.fadd(b.select(adds, held, zeros), new[r][part]), place).align = 4
            return context.get_dummy_value()

        return signature, make

    return product


_one, _two, _four = (_product(rows) for rows in (1, 2, 4))


@intrinsic
def _arrive(context: Any, counter: Any) -> Any:
    """Add 1 to counter[0]; everything written before is seen by whoever sees it."""

    def make(context: Any, b: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, b, values[0]).data
        b.atomic_rmw("add", data, ir.IntType(64)(1), "seq_cst")
        return context.get_dummy_value()

    return types.void(counter), make


@intrinsic
def _arrivals(context: Any, counter: Any) -> Any:
    def make(context: Any, b: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, b, values[0]).data
        return b.load_atomic(data, "seq_cst", 8)

    return types.int64(counter), make


@intrinsic
def _give_way(context: Any) -> Any:
    """Let another thread have the core."""

    def make(context: Any, b: Any, signature: Any, values: Any) -> Any:
        if os.name == "posix":
            b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.IntType(32), []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), make


@exact
def _meet(t: int, threads: int, s: Scratch) -> None:
    """Return when all threads have come here: the counter only grows, as on a GPU."""
    if threads == 1:
        return
    s.met[t, 0] += threads
    _arrive(s.arrived)
    spins = 0
    while _arrivals(s.arrived) < s.met[t, 0]:
        spins += 1
        if spins > SPINS:
            _give_way()


@exact
def _multiply(t: int, threads: int, x: np.ndarray, count: int, w: np.ndarray, y: np.ndarray, adds: bool) -> None:
    """y[:count] = x[:count] times panels w [P, K, 64], or += with `adds`; this thread's panels."""
    size, xs, ys = w.shape[1], x.shape[1], y.shape[1]
    for p in range(t, w.shape[0], threads):
        m, at = 0, p * size * PANEL
        while m + 4 <= count:
            _four(x, m * xs, xs, w, at, size, y, m * ys + p * PANEL, ys, adds)
            m += 4
        if m + 2 <= count:
            _two(x, m * xs, xs, w, at, size, y, m * ys + p * PANEL, ys, adds)
            m += 2
        if m < count:
            _one(x, m * xs, xs, w, at, size, y, m * ys + p * PANEL, ys, adds)


@reordered
def _normed(x: np.ndarray, weight: np.ndarray, eps: float, y: np.ndarray) -> None:
    """y = x / sqrt(mean(x^2) + eps) * weight, over weight's length."""
    size = weight.shape[0]
    total = np.float32(0)
    for i in range(size):
        total += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(size) + np.float32(eps))
    for i in range(size):
        y[i] = x[i] * scale * weight[i]


@exact
def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
    """reference.rotate, in place: x, cos, sin [D]."""
    half = x.shape[0] // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] + b * sin[i]
        x[i + half] = b * cos[i + half] + a * sin[i + half]


@reordered
def _dot(a: np.ndarray, b: np.ndarray) -> np.float32:
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@exact
def _attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scores: np.ndarray, out: np.ndarray) -> None:
    """softmax(q k^T / sqrt(D)) v of one head: q and out [D], keys and values [n, D], scores [>= n] scratch."""
    n, d = keys.shape
    scale, most = np.float32(1 / math.sqrt(d)), np.float32(-np.inf)
    for i in range(n):
        scores[i] = _dot(q, keys[i]) * scale
        most = max(most, scores[i])
    total = np.float32(0)
    for i in range(n):
        scores[i] = math.exp(scores[i] - most)
        total += scores[i]
    for j in range(d):
        out[j] = np.float32(0)
    for i in range(n):
        share = scores[i] / total
        row = values[i]
        for j in range(d):
            out[j] += share * row[j]


@exact
def _stack(t: int, threads: int, w: Stack, kv: np.ndarray, count: int, s: Scratch) -> None:
    """s.x[:count] through all layers; vector m is position s.at[m] of row s.row[m], which others may be of too."""
    x, y, z, gated, a, d = s.x, s.y, s.z, s.gated, s.normed[t], w.head_dim
    group, kv_heads, hidden = w.heads // w.kv_heads, w.kv_heads, w.norm.shape[0]
    for layer in range(w.qkv.shape[0]):
        for m in range(count):
            _normed(x[m, :hidden], w.input_norm[layer], w.eps, a[m])
        _multiply(t, threads, a, count, w.qkv[layer], y, False)
        _meet(t, threads, s)
        for unit in range(t, count * kv_heads, threads):
            m, g = unit // kv_heads, unit % kv_heads
            cos, sin = w.rope[0, s.at[m]], w.rope[1, s.at[m]]
            for h in range(g * group, (g + 1) * group):
                q = y[m, h * d : (h + 1) * d]
                _normed(q, w.qk_norm[layer, h], w.eps, q)
                _rotate(q, cos, sin)
            k = y[m, (w.heads + g) * d : (w.heads + g + 1) * d]
            v = y[m, (w.heads + kv_heads + g) * d : (w.heads + kv_heads + g + 1) * d]
            _normed(k, w.qk_norm[layer, w.heads + g], w.eps, k)
            _rotate(k, cos, sin)
            keys, values = kv[layer, 0, s.row[m], g, s.at[m]], kv[layer, 1, s.row[m], g, s.at[m]]
            for i in range(d):
                keys[i], values[i] = k[i], v[i]
        _meet(t, threads, s)
        for unit in range(t, count * kv_heads, threads):
            m, g = unit // kv_heads, unit % kv_heads
            keys, values = kv[layer, 0, s.row[m], g, : s.at[m] + 1], kv[layer, 1, s.row[m], g, : s.at[m] + 1]
            for h in range(g * group, (g + 1) * group):
                _attend(y[m, h * d : (h + 1) * d], keys, values, s.scores[t], z[m, h * d : (h + 1) * d])
        _meet(t, threads, s)
        _multiply(t, threads, z, count, w.o[layer], x, True)
        _meet(t, threads, s)
        for m in range(count):
            _normed(x[m, :hidden], w.post_norm[layer], w.eps, a[m])
        gate_up = w.gate_up[layer]
        _multiply(t, threads, a, count, gate_up, y, False)
        for m in range(count):
            for p in range(t, gate_up.shape[0], threads):  # this thread's own panels
                for i in range(HALF):
                    gate = y[m, p * PANEL + i]
                    gated[m, p * HALF + i] = gate / (np.float32(1) + math.exp(-gate)) * y[m, p * PANEL + HALF + i]
        _meet(t, threads, s)
        _multiply(t, threads, gated, count, w.down[layer], x, True)
        _meet(t, threads, s)


@exact
def _largest(logits: np.ndarray) -> int:
    best = 0
    for i in range(1, logits.shape[0]):
        if logits[i] > logits[best]:
            best = i
    return best


@exact
def _keep_top_k(logits: np.ndarray, k: int, kept: np.ndarray) -> None:
    """What is less than the k-th largest becomes -inf; kept [>= k] is scratch."""
    found = 0
    for i in range(logits.shape[0]):
        x = logits[i]
        if found == k and x <= kept[k - 1]:
            continue
        j = found if found < k else k - 1
        while j > 0 and kept[j - 1] < x:
            kept[j] = kept[j - 1]
            j -= 1
        kept[j] = x
        found = min(found + 1, k)
    for i in range(logits.shape[0]):
        if logits[i] < kept[k - 1]:
            logits[i] = -np.inf


@exact
def _ascending(x: np.ndarray, order: np.ndarray) -> None:
    """order [V] becomes x's argsort, equals by index: a Shell sort, since numba compiles numpy's for two seconds."""
    for i in range(x.shape[0]):
        order[i] = i
    for gap in (1750, 701, 301, 132, 57, 23, 10, 4, 1):
        for i in range(gap, x.shape[0]):
            j, moved = i, order[i]
            while j >= gap and (
                x[order[j - gap]] > x[moved] or (x[order[j - gap]] == x[moved] and order[j - gap] > moved)
            ):
                order[j] = order[j - gap]
                j -= gap
            order[j] = moved


@exact
def _keep_top_p(logits: np.ndarray, tail: float, order: np.ndarray) -> None:
    """The smallest whose cumulative probability is at most `tail` become -inf, but for the largest; order: scratch."""
    _ascending(logits, order)
    last = logits.shape[0] - 1
    most, total, below = logits[order[last]], 0.0, 0.0
    for i in range(last + 1):
        total += math.exp(logits[i] - most)
    for j in range(last):
        below += math.exp(logits[order[j]] - most) / total
        if np.float32(below) > tail:
            return
        logits[order[j]] = -np.inf


@exact
def _draw(logits: np.ndarray, uniform: float, sums: np.ndarray) -> int:
    """megakernel.sampler.draw of one voice; sums [V] is scratch."""
    size, most = logits.shape[0], logits[_largest(logits)]
    before, highest = 0.0, np.float32(0)
    for begin in range(0, size, SUMS_OF):
        within = 0.0
        for i in range(begin, min(begin + SUMS_OF, size)):
            weight = np.float32(math.exp(logits[i] - most))
            within += weight
            sums[i] = np.float32(before) + np.float32(within) if weight > 0 else np.float32(0)
            highest = max(highest, sums[i])
        before += np.float32(within)
    target = min(np.float32(uniform) * highest, np.nextafter(highest, np.float32(0)))
    for i in range(size):
        if sums[i] > target:
            return i
    return size - 1


@exact
def _pick(logits: np.ndarray, knobs: np.ndarray, uniform: float, scratch: np.ndarray, order: np.ndarray) -> int:
    """megakernel.sampler.pick of one voice; changes its logits [V]."""
    if knobs[0] == 0:
        return _largest(logits)
    for i in range(logits.shape[0]):
        logits[i] /= knobs[1]
    if 0 < knobs[2] < logits.shape[0]:
        _keep_top_k(logits, int(knobs[2]), scratch)
    if knobs[3] > 0:
        _keep_top_p(logits, knobs[3], order)
    return _draw(logits, uniform, scratch)


@exact
def _restrict(logits: np.ndarray, history: np.ndarray, penalty: float, early: bool, f: Frame) -> None:
    """megakernel.sampler.restrict of one voice, in place: logits and history [V]."""
    for i in range(f.vocab):
        if history[i]:
            logits[i] = logits[i] * penalty if logits[i] < 0 else logits[i] / penalty
        if (i >= f.suppress_from and i != f.eos) or (early and i == f.eos):
            logits[i] = -np.inf


@exact
def frame(
    t: int,
    threads: int,
    talker: Stack,
    predictor: Stack,
    f: Frame,
    state: State,
    c: Columns,
    codes: np.ndarray,
    s: Scratch,
) -> None:
    """FrameStep.step of n voices: codes [n, C]; or FrameStep.prefill of c.text, where codes has no rows.

    Every thread t of `threads` makes the same call.
    """
    n, books = codes.shape
    count, hidden, narrow, entries = c.row.shape[0], talker.norm.shape[0], predictor.norm.shape[0], f.inputs.shape[1]
    for m in range(t, count, threads):
        s.row[m], s.at[m] = c.row[m], c.position[m]
        for i in range(hidden):
            s.x[m, i] = c.text[m, i]
            if n:
                s.x[m, i] += state.pending[c.row[m], i]
    _meet(t, threads, s)
    w, kv, head, a = talker, state.kv, f.codec_head, s.normed[t]
    for book in range(books):
        if book:
            w, kv, head = predictor, state.predictor_kv, f.heads[book - 1]
            count = 2 * n if book == 1 else n
        _stack(t, threads, w, kv, count, s)
        if n == 0:
            return
        size = w.norm.shape[0]
        for m in range(n):
            _normed(s.x[(m + 1) * (count // n) - 1, :size], w.norm, w.eps, a[m])
        _multiply(t, threads, a, n, head, s.logits, False)
        if book == 0 and f.projection.shape[0]:
            _multiply(t, threads, a, n, f.projection, s.y, False)
        _meet(t, threads, s)
        for m in range(t, n, threads):
            row, logits, knobs = c.row[m], s.logits[m, : entries if book else f.vocab], c.knobs[m, 1 if book else 0]
            pending = state.pending[row]
            if book == 0:
                _restrict(logits, state.history[row], c.penalty[m], c.early[m], f)
            code = _pick(logits, knobs, c.uniform[m, book], s.sums[t], s.order[t])
            codes[m, book] = code
            at = m
            if book == 0:
                state.history[row, code] = True
                state.done[row] |= code == f.eos
                if state.done[row]:
                    codes[m, 0] = f.eos
                code, at = min(code, entries - 1), 2 * m + 1
                for i in range(narrow):
                    s.x[2 * m, i] = s.y[m, i] + f.bias[i] if f.projection.shape[0] else a[m, i]
                for i in range(hidden):
                    pending[i] = 0
                s.row[2 * m], s.at[2 * m] = m, 0
            for i in range(hidden):
                pending[i] += _wide(f.embeddings[book, code, i])
            if book + 1 < books:
                for i in range(narrow):
                    s.x[at, i] = _wide(f.inputs[book, code, i])
                s.row[at], s.at[at] = m, book + 1
        _meet(t, threads, s)

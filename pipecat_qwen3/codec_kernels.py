"""Triton kernels of a codec pass: a product that brings along all that surrounds it, attention, and what is left.

Steps before x are read where they lie, in the voices' old tails; norm, activation, residual and snake are applied to
what a program has in registers; and the tails are handed on beside. `codec_triton.py` launches them.
"""
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl

STAGES = tl.constexpr(4)
"""Tiles of a product that are on their way at a time."""


@triton.jit(do_not_specialize=["voices", "steps", "kernel", "dilation"])
def product(
    x, weight, bias, plus, y, waved, frequency, size, old, new, rows, offset, memory, partial, tickets,
    voices, steps, inputs, outputs, channels, kernel, dilation, eps,
    THEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    DOT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """See Product. A program makes ROWS steps of COLUMNS outputs from its share of the inputs.

    Without DOT it keeps a sum of every DEPTH-th input until the end. Where the inputs are shared, the program that
    comes last adds up what all have left in `partial` [shares, voices * steps, outputs], always in the same order.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    deep = tl.arange(0, DEPTH)
    if DOT:
        m, n, left, right = row[:, None], column[None, :], deep[None, :], deep[:, None]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        value = tl.zeros((ROWS, COLUMNS), tl.float32)
        square = tl.zeros((ROWS, 1), tl.float32)
    else:
        m, n, left = row[:, None, None], column[None, :, None], deep[None, None, :]
        right = left
        total = tl.zeros((ROWS, COLUMNS, DEPTH), tl.float32)
        value = tl.zeros((ROWS, COLUMNS, DEPTH), tl.float32)
        square = tl.zeros((ROWS, 1, DEPTH), tl.float32)
    voice, step = m // steps, m % steps
    pieces = tl.cdiv(inputs, DEPTH)
    past = (kernel - 1) * dilation
    share, shares = tl.program_id(2), tl.num_programs(2)
    for i in tl.range(kernel * pieces * share // shares, kernel * pieces * (share + 1) // shares, num_stages=STAGES):
        tap = i // pieces
        c = (i % pieces) * DEPTH
        at = step - past + tap * dilation
        source = x + (voice * steps + at) * inputs
        if old is not None:
            source = tl.where(at >= 0, source, old + voice * memory + offset + (past + at) * inputs)
        seen, used = m < voices * steps, n < outputs
        if not EVEN:
            seen, used = seen & (c + left < inputs), used & (c + right < inputs)
        a = tl.load(source + c + left, mask=seen, other=0.0)
        place = weight + n * (kernel * inputs) + tap * inputs + c + right
        b = tl.load(place, mask=used, other=0.0)
        if DOT:
            total += _dot(a, b, EXACT)
        else:
            total += a * b
        if THEN == "gate":
            b = tl.load(place + outputs * inputs, mask=used, other=0.0)
            if DOT:
                value += _dot(a, b, EXACT)
            else:
                value += a * b
        if eps is not None:
            if DOT:
                square += tl.sum(a * a, 1)[:, None]
            else:
                square += a * a
    if not DOT:
        total, value, square = tl.sum(total, 2), tl.sum(value, 2), tl.sum(square, 2)
    m, n = row[:, None], column[None, :]
    made = (m < voices * steps) & (n < outputs)
    target = m * outputs + n
    last = True
    if partial is not None:
        sums = voices * steps * outputs
        tl.store(partial + share * sums + target, total, mask=made)
        tl.debug_barrier()  # all threads have stored before one says so
        ticket = tickets + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        last = tl.atomic_add(ticket, 1, sem="acq_rel") == shares - 1
        tl.debug_barrier()
        if last:
            tl.store(ticket, 0)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for part in range(shares):
                total += tl.load(partial + part * sums + target, mask=made, other=0.0, cache_modifier=".cg")
    if last:
        if eps is not None:
            scale = tl.rsqrt(square / inputs + eps)
            total *= scale
            value *= scale
        if bias is not None:
            total += tl.load(bias + n, mask=n < outputs, other=0.0)
        if THEN == "gelu":
            total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
        if THEN == "gate":
            total = total * tl.sigmoid(total) * value
        if THEN == "clamp":
            total = tl.minimum(tl.maximum(total, -1.0), 1.0)
        if plus is not None:
            total += tl.load(plus + target, mask=made, other=0.0)
        if y is not None:
            tl.store(y + target, total, mask=made)
        if waved is not None:
            wave, _ = sine_cosine(total * tl.load(frequency + n % channels))
            wave *= tl.load(size + n % channels)
            tl.store(waved + target, total + wave * wave, mask=made)
    if old is not None:
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * shares + share
        programs = tl.num_programs(0) * tl.num_programs(1) * shares
        _hand_on(x, old, new, rows, offset, memory, voices, past * inputs, steps * inputs, program, programs)


@triton.jit
def _dot(a, b, EXACT: tl.constexpr):
    """The product on tensor cores, which read 11 bits of a number and add in fp32.

    EXACT: of the first 11 bits of each and the next 11, all pairs but the last, to 2e-7 (Ootomo and Yokota, 2022).
    """
    if not EXACT:
        return tl.dot(a, b, input_precision="tf32")
    a_high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    b_high = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    total = tl.dot(a - a_high, b_high, input_precision="tf32")
    total = tl.dot(a_high, b - b_high, total, input_precision="tf32")
    return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def sine_cosine(x):
    """Both to 2e-7 for |x| < 30,000, without the branch for huge x that tl.sin takes registers and local memory for.

    x is brought to [-pi/2, pi/2] with pi in four parts (Cody and Waite), where Taylor's series to x^11 is as exact.
    """
    turns = tl.floor(x * 0.3183098861837907 + 0.5)
    half = tl.floor(x * 0.3183098861837907) + 0.5
    sine = _series(x, turns) * (1.0 - 2.0 * (turns - 2.0 * tl.floor(turns * 0.5)))
    half_turns = half - 0.5
    return sine, _series(x, half) * (2.0 * (half_turns - 2.0 * tl.floor(half_turns * 0.5)) - 1.0)


@triton.jit
def _series(x, turns):
    """sin(x - turns * pi), which must lie in [-pi/2, pi/2]."""
    x = x - turns * 3.140625 - turns * 0.0009670257568359375
    x = x - turns * 6.2771141529083251953e-07 - turns * 1.2154201256553420762e-10
    s = x * x
    s = s * (-1.6666667e-1 + s * (8.3333333e-3 + s * (-1.9841270e-4 + s * (2.7557319e-6 - s * 2.5052108e-8))))
    return x + x * s


@triton.jit
def _hand_on(x, old, new, rows, offset, memory, voices, size, fresh, program, programs):
    """Write the next tails, the last `size` floats of a voice's old tail and its `fresh` ones: a part in each program.

    The old tails are a copy, so that it does not matter who still reads them.
    """
    for start in range(program * 1024, voices * size, programs * 1024):
        i = start + tl.arange(0, 1024)
        inside = i < voices * size
        voice, place = i // size, i % size
        source = place + fresh
        source = tl.where(source < size, old + voice * memory + offset + source, x + voice * fresh + source - size)
        target = tl.load(rows + voice, mask=inside, other=0) * memory + offset + place
        tl.store(new + target, tl.load(source, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["voices", "steps"])
def depthwise(
    x, weight, bias, y, old, new, rows, offset, memory, voices, steps, width, eps,
    KERNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See Depthwise. A program makes one step."""
    program = tl.program_id(0)
    voice, step = program // steps, program % steps
    c = tl.arange(0, BLOCK)
    inside = c < width
    total = tl.load(bias + c, mask=inside, other=0.0)
    for tap in tl.static_range(KERNEL):
        at = step - KERNEL + 1 + tap
        source = x + (voice * steps + at) * width
        source = tl.where(at >= 0, source, old + voice * memory + offset + (KERNEL - 1 + at) * width)
        total += tl.load(source + c, mask=inside, other=0.0) * tl.load(weight + tap * width + c, mask=inside, other=0.0)
    total = tl.where(inside, total - tl.sum(total, 0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(total * total, 0) / width + eps)
    tl.store(y + program * width + c, total * scale, mask=inside)
    programs = tl.num_programs(0)
    _hand_on(x, old, new, rows, offset, memory, voices, (KERNEL - 1) * width, steps * width, program, programs)


@triton.jit(do_not_specialize=["frames"])
def embed(
    codes, tables, first_entry, x, frames_done, first, rows, frames, codebooks, size, width,
    BOOKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program sums one frame of a voice; that of a voice's first frame also counts, and keeps the count before."""
    program = tl.program_id(0)
    voice, frame = program // frames, program % frames
    c, d = tl.arange(0, BOOKS), tl.arange(0, BLOCK)[None, :]
    code = tl.load(codes + (voice * codebooks + c) * frames + frame, mask=c < codebooks, other=0)
    entry = tl.load(first_entry + c, mask=c < codebooks, other=0) + tl.minimum(tl.maximum(code, 0), size - 1)
    inside = (c < codebooks)[:, None] & (d < width)
    total = tl.sum(tl.load(tables + entry[:, None] * width + d, mask=inside, other=0.0), 0)
    tl.store(x + program * width + d, total[None, :], mask=d < width)
    if frame == 0:
        row = tl.load(rows + voice)
        done = tl.load(frames_done + row)
        tl.store(first + voice, done)
        tl.store(frames_done + row, done + frames)


@triton.jit(do_not_specialize=["frames", "layer"])
def attend(
    qkv, kv, y, rows, first, rates, frames, layer, layers, ring, window, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Rotary attention of one voice's frames and of the GROUP query heads that share a key head."""
    voice, head = tl.program_id(0), tl.program_id(1)
    done = tl.load(first + voice)
    d = tl.arange(0, HALF)
    rate = tl.load(rates + d)
    width = 2 * HALF
    line = (GROUP + 2) * HEADS * width
    frame_floats = layers * 2 * HEADS * width
    keys = kv + tl.load(rows + voice) * ring * frame_floats + (layer * 2 * HEADS + head) * width
    for t in range(frames):
        key = qkv + (voice * frames + t) * line + (GROUP * HEADS + head) * width + d
        near, far = _turned(key, done + t, rate, HALF)
        place = keys + (done + t) % ring * frame_floats + d
        tl.store(place, near)
        tl.store(place + HALF, far)
        tl.store(place + HEADS * width, tl.load(key + HEADS * width))
        tl.store(place + HEADS * width + HALF, tl.load(key + HEADS * width + HALF))
    tl.debug_barrier()  # other threads of this program read what these wrote
    slot = tl.arange(0, SLOTS)
    last = done + frames - 1
    frame = last - (last + ring - slot) % ring  # the newest in each slot; below 0: none yet
    written = (slot < ring) & (frame >= 0)
    place = keys + slot[:, None] * frame_floats + d[None, :]
    near_key = tl.load(place, mask=written[:, None], other=0.0)
    far_key = tl.load(place + HALF, mask=written[:, None], other=0.0)
    near_value = tl.load(place + HEADS * width, mask=written[:, None], other=0.0)
    far_value = tl.load(place + HEADS * width + HALF, mask=written[:, None], other=0.0)
    for t in range(frames):
        behind = done + t - frame
        seen = written & (behind >= 0) & (behind < window)
        for g in tl.static_range(GROUP):
            query = head * GROUP + g
            near, far = _turned(qkv + (voice * frames + t) * line + query * width + d, done + t, rate, HALF)
            score = tl.sum(near_key * near[None, :] + far_key * far[None, :], 1) * scale
            score = tl.where(seen, score, float("-inf"))
            share = tl.exp(score - tl.max(score, 0))
            share = (share / tl.sum(share, 0))[:, None]
            target = y + ((voice * frames + t) * GROUP * HEADS + query) * width + d
            tl.store(target, tl.sum(share * near_value, 0))
            tl.store(target + HALF, tl.sum(share * far_value, 0))


@triton.jit
def _turned(place, position, rate, HALF: tl.constexpr):
    """Both halves of a head, rotated: dimension i pairs with i + HALF."""
    near, far = tl.load(place), tl.load(place + HALF)
    angle = position.to(tl.float32) * rate
    sine, cosine = sine_cosine(angle)
    return near * cosine - far * sine, far * cosine + near * sine

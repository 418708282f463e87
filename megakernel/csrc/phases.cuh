// The phases of a frame, one function each, named as in megakernel/README.md; run() is one entry of the phase table.
//
// The residual stream lies in x0 or x1: `qkv` reads x0 (the first layer: its own source) plus the sums that `down` left
// in parts, and keeps the result in x1; `gate_up` reads x1 plus what `o` left in parts, and keeps it in x0; the heads
// read x0 plus parts. What starts the predictor (the talker's hidden state, a code's embedding) is put into x1, from
// where the predictor's first layer takes it. So nothing is read that another block may be writing.
#pragma once
#include "attention.cuh"
#include "product.cuh"
#include "sample.cuh"

namespace mk {

constexpr int MOST_COLUMN_TILES = 4;
MK_SIZE int staged_bytes(int k, int nt) { return k / 16 * nt * LANES * int(sizeof(Quad)); }

// Columns in tiles of 8 that a product with staged activations takes at once: as many as shared memory holds; the rest
// takes the same weights again, from L2.
MK_SIZE int column_tiles(int columns, int k) {
    int nt = at_most(ceil_div(columns, 8), MOST_COLUMN_TILES);
    while (nt > 1 && (staged_bytes(k, nt) > STAGED_BYTES || ceil_div(columns, 8) % nt)) nt--;
    return nt;
}

using CodecHead = Matrix<VOCAB, Talker::hidden>;
using CodeHead = Matrix<CODES, Predictor::hidden>;
using Projection = Matrix<Predictor::hidden, Talker::hidden>;
constexpr size_t CODE_HEAD_SIZE = size_t(CODES) * Predictor::hidden / 8;

// ---- shared memory --------------------------------------------------------------------------------------------------

MK_SIZE int most(int a, int b) { return a > b ? a : b; }
constexpr int TALKER_TILES = column_tiles(COLUMNS, Talker::hidden);
constexpr int FIRST_TILES = column_tiles(SLOTS, Predictor::hidden);
constexpr int PREDICTOR_TILES = column_tiles(COLUMNS, Predictor::hidden);
constexpr int STAGED = most(staged_bytes(Talker::hidden, TALKER_TILES),
                            most(staged_bytes(Predictor::hidden, FIRST_TILES), staged_bytes(Predictor::hidden, PREDICTOR_TILES)));
constexpr int SUMS = WARPS * most(REDUCED_TILES, MOST_COLUMN_TILES) * LANES * 16;

struct Work {
    Column columns[COLUMNS];
    float squares[WARPS][8 * MOST_COLUMN_TILES];
    union {
        struct {
            alignas(128) char staged[STAGED];
            alignas(128) char sums[SUMS];
        };
        alignas(128) char space[most(most(int(sizeof(AttentionWork<Talker>)), int(sizeof(AttentionWork<Predictor>))),
                                     int(sizeof(SampleWork)))];
    };
    MK_DEV bool active(int slot) const { return columns[slot % COLUMNS].row >= 0; }
};
static_assert(sizeof(Work) <= SHARED_BYTES, "megakernel/kernels.py gives a launch too little shared memory");

struct Block {
    const Args& a;
    Work& w;
    Ahead ahead;
    Phase next;  // word 0xffffffff: none

    MK_DEV void read_ahead_for_next();
};

// ---- products with a norm -------------------------------------------------------------------------------------------

// Norm weights times the residual stream, rounded, into shared memory as fragments; its squares summed; the sum of the
// stream and the parts kept in `keep` by one block a tile. A lane reads only what it wrote.
template <int K, int NT, class Load>
MK_DEV void stage(Work& w, const float* norm, float* keep, int first_slot, int slots, Load load) {
    int tid = thread(), warp = tid / LANES, lane = tid % LANES, g = lane / 4, t = lane % 4;
    float squares[NT];
    MK_UNROLL
    for (int nt = 0; nt < NT; nt++) squares[nt] = 0;
    for (int tile = warp; tile < K / 16; tile += WARPS) {
        int k = 16 * tile + 4 * t;
        float4 n = *(const float4*)(norm + k);
        MK_UNROLL
        for (int nt = 0; nt < NT; nt++) {
            int slot = first_slot + 8 * nt + g;
            Quad q{};
            if (slot < slots && w.active(slot)) {
                float4 x = load(slot, k);
                if (keep && tile % BLOCKS == blockIdx.x) *(float4*)(keep + size_t(slot) * WIDE + k) = x;
                squares[nt] += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
                q = narrow4(make_float4(x.x * n.x, x.y * n.y, x.z * n.z, x.w * n.w));
            }
            ((Quad*)w.staged)[(tile * NT + nt) * LANES + lane] = q;
        }
    }
    MK_UNROLL
    for (int nt = 0; nt < NT; nt++) {
        float sum = add_over(squares[nt], 1, 4);
        if (t == 0) w.squares[warp][8 * nt + g] = sum;
    }
}

template <int K>
MK_DEV float inverse_rms(const Work& w, int column) {
    float sum = 0;
    for (int i = 0; i < WARPS; i++) sum += w.squares[i][column];
    return 1.0f / sqrtf(sum / K + NORM_EPS);
}

// The whole phase: finish(slot, tile, row, low, high) with the norm applied. `rest` runs at the end of each round.
template <class M, int NT, class Load, class Finish, class Rest>
MK_DEV void normed_product(Block& b, const Fragment* weights, const float* norm, float* keep, int first, int slots,
                           Load load, Finish finish, Rest rest) {
    int lane = thread() % LANES;
    for (int from = first; from < slots; from += 8 * NT) {
        bool last = from + 8 * NT >= slots;
        if (from > first) {
            __syncthreads();
            read_ahead(b.ahead, shelf<M, NT>(weights));
        }
        stage<M::k, NT>(b.w, norm, keep, from, slots, load);
        product<M, NT>(
            b.ahead, weights, (float*)b.w.sums,
            [&](int k_tile, int nt) { return ((const Quad*)b.w.staged)[(k_tile * NT + nt) * LANES + lane]; },
            [&] {
                if (last) b.read_ahead_for_next();
            },
            [&](int tile, int, int row, int column, float low, float high) {
                int slot = from + column;
                if (slot >= slots || !b.w.active(slot)) return;
                float r = inverse_rms<M::k>(b.w, column);
                finish(slot, tile, row, low * r, high * r);
            });
        rest(from);
    }
}

struct Nothing {
    MK_DEV void operator()(int) const {}
};

// x plus the parts of a sum that o or down left, four neighbours of a column
template <int SPLIT>
MK_DEV float4 with_parts(const Args& a, const float* x, int slot, int k) {
    float4 v = *(const float4*)(x + size_t(slot) * WIDE + k);
    MK_UNROLL
    for (int p = 0; p < SPLIT; p++) {
        float4 y = *(const float4*)(a.parts + (size_t(p) * SLOTS + slot) * WIDE + k);
        v.x += y.x, v.y += y.y, v.z += y.z, v.w += y.w;
    }
    return v;
}

// The talker's input: a prompt's position, or what the last frame left plus the next text embedding.
MK_DEV float4 first_input(const Args& a, const Work& w, int slot, int k) {
    Quad t = *(const Quad*)(a.text + size_t(slot) * Talker::hidden + k);
    float x[4];
    MK_UNROLL
    for (int e = 0; e < 4; e++) x[e] = widen(t.e[e]);
    if (!a.prefill) {
        Quad p = *(const Quad*)(a.pending + size_t(w.columns[slot].row) * Talker::hidden + k);
        MK_UNROLL
        for (int e = 0; e < 4; e++) x[e] = widen(narrow(x[e] + widen(p.e[e])));
    }
    return make_float4(x[0], x[1], x[2], x[3]);
}

// ---- one function a phase -------------------------------------------------------------------------------------------

// One layer of a stack in tiles of columns: STAGED_TILES at once where activations are staged, else DIRECT_TILES.
template <class S, int STAGED_TILES, int DIRECT_TILES>
struct Layer {
    using Qkv = Matrix<S::qkv, S::hidden>;
    using Out = Matrix<S::hidden, S::q, S::split_o>;
    using GateUp = Matrix<2 * S::inter, S::hidden>;
    using Down = Matrix<S::hidden, S::inter, S::split_down>;

    MK_DEV static const Fragment* weights(const Args& a, Phase p) {
        return (p.part() == TALKER ? a.talker : a.predictor) + p.layer() * S::layer_size;
    }
    MK_DEV static const float* norms(const Args& a, Phase p) {
        return (p.part() == TALKER ? a.talker_norms : a.predictor_norms) + p.layer() * S::norms;
    }
    MK_DEV static int slots(Phase p) { return p.part() == PREDICTOR_FIRST ? SLOTS : COLUMNS; }

    MK_DEV static Shelf shelf_of(const Args& a, Phase p) {
        const Fragment* from = weights(a, p);
        switch (p.op()) {
            case QKV: return shelf<Qkv, STAGED_TILES>(from + S::qkv_at);
            case O: return shelf<Out, DIRECT_TILES>(from + S::o_at);
            case GATE_UP: return shelf<GateUp, STAGED_TILES>(from + S::gate_up_at);
            case DOWN: return shelf<Down, DIRECT_TILES>(from + S::down_at);
        }
        return Shelf{};
    }

    MK_DEV static void run(Block& b, Phase p) {
        switch (p.op()) {
            case QKV: return qkv(b, p);
            case ATTENTION: return attention(b, p);
            case O: return o(b, p);
            case GATE_UP: return gate_up(b, p);
            case DOWN: return down(b, p);
        }
    }

    MK_DEV static void qkv(Block& b, Phase p) {
        const Args& a = b.a;
        bool talker = p.part() == TALKER, first = p.layer() == 0;
        normed_product<Qkv, STAGED_TILES>(
            b, weights(a, p) + S::qkv_at, norms(a, p), talker || !first ? a.x1 : nullptr, 0, slots(p),
            [&](int slot, int k) {
                if (!first) return with_parts<S::split_down>(a, a.x0, slot, k);
                return talker ? first_input(a, b.w, slot, k) : with_parts<0>(a, a.x1, slot, k);
            },
            [&](int slot, int tile, int row, float low, float high) {
                float* to = a.raw + size_t(slot) * S::qkv + tile * 16 + row;
                to[0] = low, to[8] = high;
            },
            Nothing{});
    }

    MK_DEV static void attention(Block& b, Phase p) {
        const Args& a = b.a;
        bool talker = p.part() == TALKER, two = p.part() == PREDICTOR_FIRST;
        int positions = talker ? a.positions : CODEBOOKS, rows = talker ? a.rows : COLUMNS;
        size_t row_size = size_t(S::kv_heads) * positions * HEAD_DIM;
        Element* keys = (talker ? a.kv : a.predictor_kv) + size_t(2 * p.layer()) * rows * row_size;
        const float* rope = talker ? a.talker_rope : a.predictor_rope;
        int item = blockIdx.x;
        for (int column = 0; column < COLUMNS; column++) {
            const Column& c = b.w.columns[column];
            if (c.row < 0 || c.following == 0) continue;
            int start = talker ? c.start : two ? 0 : p.code();
            int items = S::kv_heads * pieces(start);
            Element* own = keys + (talker ? c.row : column) * row_size;
            Cache cache{own, own + rows * row_size, positions, start, talker ? c.following : 1 + two, column, talker ? 1 : COLUMNS};
            for (; item < items; item += BLOCKS)
                attend<S>(a, *(AttentionWork<S>*)b.w.space, cache, norms(a, p), rope, item % S::kv_heads, item / S::kv_heads);
            item -= items;
        }
    }

    MK_DEV static void o(Block& b, Phase p) {
        const Args& a = b.a;
        bool talker = p.part() == TALKER;
        plain_product<Out>(b, weights(a, p) + S::o_at, slots(p), [&](int slot, int k) {
            if (slot >= slots(p) || !b.w.active(slot)) return Quad{};
            return narrow4(attended<S>(a, slot, talker ? pieces(b.w.columns[slot].start) : 1, k));
        });
    }

    MK_DEV static void gate_up(Block& b, Phase p) {
        const Args& a = b.a;
        normed_product<GateUp, STAGED_TILES>(
            b, weights(a, p) + S::gate_up_at, norms(a, p) + S::post_norm_at, a.x0, 0, slots(p),
            [&](int slot, int k) { return with_parts<S::split_o>(a, a.x1, slot, k); },
            [&](int slot, int tile, int row, float gate, float up) {
                a.inner[size_t(slot) * S::inter + tile * 8 + row] = narrow(gate / (1.0f + expf(-gate)) * up);
            },
            Nothing{});
    }

    MK_DEV static void down(Block& b, Phase p) {
        const Args& a = b.a;
        plain_product<Down, true>(b, weights(a, p) + S::down_at, slots(p), [&](int slot, int k) {
            return load_quad((const Quad*)(a.inner + size_t(slot) * S::inter + k), slot < slots(p) && b.w.active(slot));
        });
    }

    // o and down: activations straight from where they lie, the parts of the sums to `parts`.
    template <class M, bool TOGETHER = false, class Load>
    MK_DEV static void plain_product(Block& b, const Fragment* weights, int slots, Load load) {
        constexpr int NT = DIRECT_TILES;
        int lane = thread() % LANES, g = lane / 4, t = lane % 4;
        for (int from = 0; from < slots; from += 8 * NT) {
            bool last = from + 8 * NT >= slots;
            if (from > 0) {
                __syncthreads();
                read_ahead(b.ahead, shelf<M, NT>(weights));
            }
            product<M, NT, TOGETHER>(
                b.ahead, weights, (float*)b.w.sums,
                [&](int k_tile, int nt) { return load(from + 8 * nt + g, 16 * k_tile + 4 * t); },
                [&] {
                    if (last) b.read_ahead_for_next();
                },
                [&](int tile, int part, int row, int column, float low, float high) {
                    int slot = from + column;
                    if (slot >= slots || !b.w.active(slot)) return;
                    float* to = b.a.parts + (size_t(part) * SLOTS + slot) * WIDE + tile * 16 + row;
                    to[0] = low, to[8] = high;
                });
        }
    }
};

template <class S, int SCRATCH_COLUMNS>
using LayerFor = Layer<S, column_tiles(SCRATCH_COLUMNS, S::hidden), column_tiles(SCRATCH_COLUMNS, 16)>;
using TalkerLayer = LayerFor<Talker, COLUMNS>;
using FirstLayer = LayerFor<Predictor, SLOTS>;
using PredictorLayer = LayerFor<Predictor, COLUMNS>;

// Logits of code 0, and what the predictor is fed first: the normed hidden state, projected where the model does so.
MK_DEV void codec_head(Block& b) {
    const Args& a = b.a;
    constexpr int NT = TALKER_TILES, H = Talker::hidden;
    const float* norm = a.talker_norms + T_LAYERS * Talker::norms;
    auto load = [&](int slot, int k) { return with_parts<Talker::split_down>(a, a.x0, slot, k); };
    normed_product<CodecHead, NT>(
        b, a.codec_head, norm, nullptr, 0, COLUMNS, load,
        [&](int slot, int tile, int row, float low, float high) {
            float* to = a.logits + size_t(slot) * VOCAB + tile * 16 + row;
            to[0] = low, to[8] = high;
        },
        [&](int from) {
#if PROJECTED
            __syncthreads();
            Ahead own;
            int lane = thread() % LANES;
            read_ahead(own, shelf<Projection, NT>(a.projection));
            product<Projection, NT>(
                own, a.projection, (float*)b.w.sums,
                [&](int k_tile, int nt) { return ((const Quad*)b.w.staged)[(k_tile * NT + nt) * LANES + lane]; }, [] {},
                [&](int tile, int, int row, int column, float low, float high) {
                    int slot = from + column, n = tile * 16 + row;
                    if (slot >= COLUMNS || !b.w.active(slot)) return;
                    float r = inverse_rms<H>(b.w, column);
                    float* to = a.x1 + size_t(slot) * WIDE + n;
                    to[0] = low * r + a.projection_bias[n], to[8] = high * r + a.projection_bias[n + 8];
                });
#else
            for (int i = threadIdx.x; i < 8 * NT * 4; i += THREADS)
                for (int tile = blockIdx.x; tile < H / 16; tile += BLOCKS) {
                    int slot = from + i / 4, k = 16 * tile + 4 * (i % 4);
                    if (slot >= COLUMNS || !b.w.active(slot)) continue;
                    float r = inverse_rms<H>(b.w, i / 4);
                    float4 x = load(slot, k), n = *(const float4*)(norm + k);
                    *(float4*)(a.x1 + size_t(slot) * WIDE + k) =
                        make_float4(x.x * r * n.x, x.y * r * n.y, x.z * r * n.z, x.w * r * n.w);
                }
#endif
        });
}

MK_DEV void code_head(Block& b, Phase p) {
    const Args& a = b.a;
    int first = p.part() == PREDICTOR_FIRST ? COLUMNS : 0;  // of the first pass the second position speaks
    normed_product<CodeHead, PREDICTOR_TILES>(
        b, a.heads + (p.code() - 1) * CODE_HEAD_SIZE, a.predictor_norms + P_LAYERS * Predictor::norms, nullptr,
        first, first + COLUMNS, [&](int slot, int k) { return with_parts<Predictor::split_down>(a, a.x0, slot, k); },
        [&](int slot, int tile, int row, float low, float high) {
            float* to = a.logits + size_t(slot - first) * VOCAB + tile * 16 + row;
            to[0] = low, to[8] = high;
        },
        Nothing{});
}

// Block c draws the code of column c and puts what it means into the next input.
MK_DEV void sample(Block& b, int code) {
    const Args& a = b.a;
    for (int column = blockIdx.x; column < COLUMNS; column += BLOCKS) {
        const Column& c = b.w.columns[column];
        if (c.row < 0) continue;
        int drawn = pick(a, *(SampleWork*)b.w.space, c, column, code);
        if (drawn >= (code == 0 ? VOCAB : CODES)) drawn = 0;  // no logit was a number; the twin answers 0, too
        int entry = drawn < CODES ? drawn : CODES - 1;
        int* codes = a.codes + column * CODEBOOKS;
        if (threadIdx.x == 0) {
            codes[code] = drawn;
            if (code == 0) {
                bool over = a.done[c.row] || drawn == EOS;
                a.done[c.row] = over;
                if (over) codes[0] = EOS;
                a.history[size_t(c.row) * VOCAB_WORDS + drawn / 32] |= 1u << (drawn % 32);
            }
        }
        if (code < CODEBOOKS - 1) {
            const Element* from = a.inputs + (size_t(code) * CODES + entry) * Predictor::hidden;
            float* to = a.x1 + size_t(code == 0 ? COLUMNS + column : column) * WIDE;
            for (int k = threadIdx.x; k < Predictor::hidden; k += THREADS) to[k] = widen(from[k]);
        } else {
            __syncthreads();
            for (int k = threadIdx.x; k < Talker::hidden; k += THREADS) {
                float sum = 0;
                for (int g = 0; g < CODEBOOKS; g++) {
                    int spoken = codes[g] < CODES ? codes[g] : CODES - 1;  // at the end of speech it means nothing
                    sum += widen(a.embeddings[(size_t(g) * CODES + spoken) * Talker::hidden + k]);
                }
                a.pending[size_t(c.row) * Talker::hidden + k] = narrow(sum);
            }
        }
        __syncthreads();
    }
}

// ---- the table ------------------------------------------------------------------------------------------------------

template <class A, class B>
struct Same {
    static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
    static constexpr bool value = true;
};

// Calls f with the layer that a part of the frame uses; like layers are one.
template <class F>
MK_DEV void with_layer(int part, F f) {
    if constexpr (!Same<TalkerLayer, PredictorLayer>::value)
        if (part == TALKER) return f(TalkerLayer{});
    if constexpr (!Same<FirstLayer, PredictorLayer>::value)
        if (part == PREDICTOR_FIRST) return f(FirstLayer{});
    f(PredictorLayer{});
}

MK_DEV void Block::read_ahead_for_next() {
    Shelf s{};
    if (next.word == 0xffffffffu) {
    } else if (next.op() == HEAD) {
        if (next.part() == TALKER) s = shelf<CodecHead, TALKER_TILES>(a.codec_head);
        else s = shelf<CodeHead, PREDICTOR_TILES>(a.heads + (next.code() - 1) * CODE_HEAD_SIZE);
    } else if (next.op() != SAMPLE) {
        with_layer(next.part(), [&](auto layer) { s = layer.shelf_of(a, next); });
    }
    read_ahead(ahead, s);
}

MK_DEV void run(Block& b, Phase p) {
    if (p.op() == SAMPLE) {
        sample(b, p.code());
    } else if (p.op() == HEAD) {
        p.part() == TALKER ? codec_head(b) : code_head(b, p);
    } else {
        with_layer(p.part(), [&](auto layer) { layer.run(b, p); });
    }
    if (p.op() == SAMPLE || p.op() == ATTENTION) b.read_ahead_for_next();
}

}  // namespace mk

// Every size, from the compiler's command line (megakernel/shape.py makes the definitions), and what a launch is given.
// Letters: megakernel/README.md.
#pragma once
#include "platform.h"

namespace mk {

// ---- one transformer stack ------------------------------------------------------------------------------------------

// The number of layers is no part of it, so that stacks of like layers share code.
template <int HIDDEN, int INTER, int HEADS, int KV_HEADS, int SPLIT_O, int SPLIT_DOWN>
struct Stack {
    static constexpr int hidden = HIDDEN, inter = INTER, heads = HEADS, kv_heads = KV_HEADS;
    static constexpr int group = HEADS / KV_HEADS;                      // query heads that share a key head
    static constexpr int q = HEADS * HEAD_DIM, kv = KV_HEADS * HEAD_DIM;
    static constexpr int qkv = q + 2 * kv;
    static constexpr int split_o = SPLIT_O, split_down = SPLIT_DOWN;    // parts into which the sum over k is cut
    static constexpr int split = split_o > split_down ? split_o : split_down;
    // one layer's packed matrices, in Fragments, in this order: qkv, o, gate-up, down
    static constexpr size_t qkv_at = 0;
    static constexpr size_t o_at = qkv_at + size_t(qkv) * hidden / 8;
    static constexpr size_t gate_up_at = o_at + size_t(hidden) * q / 8;
    static constexpr size_t down_at = gate_up_at + size_t(2) * inter * hidden / 8;
    static constexpr size_t layer_size = down_at + size_t(hidden) * inter / 8;
    // one layer's norms, in floats: input norm, post norm, q norm, k norm; after all layers the final norm
    static constexpr int post_norm_at = hidden, q_norm_at = 2 * hidden, k_norm_at = q_norm_at + HEAD_DIM;
    static constexpr int norms = k_norm_at + HEAD_DIM;
    static_assert(hidden % 16 == 0 && inter % 16 == 0 && HEAD_DIM % 16 == 0, "the products work on tiles of 16 x 16");
    static_assert(q % (16 * split_o) == 0 && inter % (16 * split_down) == 0, "a part of a sum is whole tiles");
};

using Talker = Stack<T_HIDDEN, T_INTER, T_HEADS, T_KV_HEADS, T_SPLIT_O, T_SPLIT_DOWN>;
using Predictor = Stack<P_HIDDEN, P_INTER, P_HEADS, P_KV_HEADS, P_SPLIT_O, P_SPLIT_DOWN>;

constexpr int SLOTS = 2 * COLUMNS;  // columns of scratch: the predictor's first pass feeds two positions a voice
constexpr int WIDE = Talker::hidden > Predictor::hidden ? Talker::hidden : Predictor::hidden;
constexpr int ATTENTION_PARTS = 8, ATTENTION_CHUNK = 64;
constexpr int VOCAB_WORDS = (VOCAB + 31) / 32;

// ---- a launch -------------------------------------------------------------------------------------------------------

// What a launch knows of one column, written by the host before every launch (megakernel/launch.py has the same fields).
struct Column {
    int row;             // where its voice's KV, history and pending input lie; -1: the column is empty
    int position;        // of its input in the voice's sequence
    int start;           // position of the first column of its row: its own in a frame, the piece's first in prefill
    int following;       // columns of its row from here on: 1 in a frame; in prefill T for the first, 0 for the others
    u32 frame;           // frames spoken before this one
    u32 seed_low, seed_high;
    int sample;          // bit 0: draw code 0; bit 1: draw the other codes; else the largest logit
    float temperature, tail, penalty;  // of code 0; tail = 1 - top_p
    int top_k;                         // as many as the vocabulary: keep all
    float other_temperature, other_tail;
    int other_top_k;
    int unused;
};
static_assert(sizeof(Column) == 64, "the host writes 64 bytes a column");

enum Op { QKV, ATTENTION, O, GATE_UP, DOWN, HEAD, SAMPLE };
enum Part { TALKER, PREDICTOR_FIRST, PREDICTOR };

// One entry of the phase table: op | part << 4 | layer << 8 | code << 16 (code: the code that is being predicted).
struct Phase {
    u32 word;
    MK_DEV int op() const { return word & 15; }
    MK_DEV int part() const { return word >> 4 & 15; }
    MK_DEV int layer() const { return word >> 8 & 255; }
    MK_DEV int code() const { return word >> 16; }
};

struct Args {
    // weights; packed ones as megakernel/pack.py lays them out
    const Fragment *talker, *predictor, *codec_head, *heads, *projection;
    const float *talker_norms, *predictor_norms, *projection_bias;
    const Element *embeddings, *inputs;                // [C,K,H] what a code adds to the pending input; [C-1,K,Hp]
    const float *talker_rope, *predictor_rope;         // [2,P,D], [2,C,D]: cos and signed sin
    // what belongs to rows
    Element* kv;                                       // [L,2,S,kv_heads,P,D]
    Element* pending;                                  // [S,H]
    u32* history;                                      // [S,V/32] bits of the code-0 ids spoken
    int* done;                                         // [S]
    // what belongs to columns
    const Column* columns;                             // [COLUMNS]
    const Element* text;                               // [COLUMNS,H] text embeddings, or a prompt's inputs in prefill
    const float* uniforms;                             // [COLUMNS,C] random numbers to use instead of one's own, or null
    int* codes;                                        // [COLUMNS,C], the result
    // scratch of this object; everything by column, SLOTS of them
    float *x0, *x1;                                    // [SLOTS,WIDE] the residual stream; who reads which: phases.cuh
    float* parts;                                      // [split,SLOTS,WIDE] sums of o or down that are still to be added
    float* raw;                                        // [SLOTS,qkv] projections before norm and RoPE
    float* attended;                                   // [ATTENTION_PARTS,SLOTS,q]
    float* attended_sums;                              // [ATTENTION_PARTS,SLOTS,heads,2] largest score, sum of weights
    Element* inner;                                    // [SLOTS,I] silu(gate) * up
    float* logits;                                     // [COLUMNS,V]
    Element* predictor_kv;                             // [Lp,2,COLUMNS,kv_heads,C,D]
    // the launch
    const Phase* table;
    u32* barrier;                                      // arrivals of all launches so far
    u32* report;                                       // block, phase, arrivals seen, arrivals wanted of a barrier in despair
    u64 patience;                                      // nanoseconds that a block waits for the others
    int phases, positions, rows, prefill;
    u32 arrived;                                       // *barrier when this launch starts
};

}  // namespace mk

// albor's CPU kernels: a Llama-family decoder over Q4_0 or Q8_0 weights, for AVX-512 VNNI or AVX2.
//
// Included by one .cpp file for each instruction set. See cpu_decode.py for what is computed (its
// reference), for the shapes and for the rules of the functions at the end.
//
// Why not ggml: at batch 1 it reads weights at about 10 GB/s on two Sapphire Rapids cores that can
// read 28 GB/s from memory and 50 GB/s from the shared cache, and it starts threads and waits at
// some 25 barriers for each layer and token. Here a layer has five phases.
//
// Every row of logits is computed by the same operations in the same order, whatever else is in
// the call: batching, chunking and the number of threads change no bit.

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <initializer_list>
#include <new>

#include "cpu_matrix.h"

namespace {

constexpr int kMaxRows = 64;     // tokens of one pass over the weights
constexpr int kPrivateRows = 2;  // up to so many rows each thread normalises for itself
constexpr int kMaxThreads = 64;

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    float *attn_norm = nullptr, *ffn_norm = nullptr, *q_norm = nullptr, *k_norm = nullptr;
    float *bias = nullptr;  // query, key and value one after the other
};

struct Shape {
    int32_t vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads;
    int32_t head_dim, max_seq_len, num_slots, max_threads;
    float rms_norm_eps;
};

// One pass over the weights: up to kMaxRows tokens, in the order of `rows`.
struct Pass {
    const int32_t *tokens, *slots, *positions;
    const int8_t *wanted;
    float *logits;
    int num_rows = 0, num_threads = 1;
    bool one_row_a_slot = true;
    const volatile uint8_t *abort = nullptr;
};

struct Model {
    Shape s;
    Layer *layers = nullptr;
    Matrix embedding, head;
    bool tied = true;
    float *final_norm = nullptr, *cos = nullptr, *sin = nullptr;
    uint16_t *keys = nullptr, *values = nullptr;
    size_t k_head = 0, v_head = 0;  // elements of one head's cache in one slot

    // Scratch of one pass, in float32 unless quantized.
    float *x = nullptr, *qkv = nullptr, *attn_raw = nullptr;
    Activations act, attn, ffn;
    Activations own[kMaxThreads];
    float *scores[kMaxThreads] = {};
    float *row_buffer[kMaxThreads] = {};

    // Threads.
    pthread_t threads[kMaxThreads];
    int num_started = 0;  // workers, the caller not counted
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
    std::atomic<uint32_t> generation{0};
    std::atomic<int> num_sleeping{0};
    std::atomic<bool> closing{false};
    std::atomic<int> num_arrived{0};
    std::atomic<uint32_t> barrier_round{0};
    std::atomic<int> num_left{0};
    std::atomic<bool> aborted{false};
    std::atomic<bool> stopping{false};  // what all threads agree on at a barrier
    std::atomic<int> *next_job = nullptr;
    int num_phases = 0;
    Pass pass;

    int q_dim() const { return s.num_heads * s.head_dim; }
    int kv_dim() const { return s.num_kv_heads * s.head_dim; }
    int heads_a_kv() const { return s.num_heads / s.num_kv_heads; }
    uint16_t *key_cache(int slot, int layer, int head) const {
        return keys + (((size_t)slot * s.num_layers + layer) * s.num_kv_heads + head) * k_head;
    }
    uint16_t *value_cache(int slot, int layer, int head) const {
        return values + (((size_t)slot * s.num_layers + layer) * s.num_kv_heads + head) * v_head;
    }
};

inline void relax(int &spins) {
    if (++spins < 4000)
        _mm_pause();
    else
        sched_yield();  // somebody else has this thread's partner's core
}

// Waits until all threads of the pass are here. True if the pass was aborted before: the last one
// to arrive decides for all, so that none waits at a barrier that another has left.
inline bool barrier(Model &m) {
    const int n = m.pass.num_threads;
    if (n == 1) return m.aborted.load(std::memory_order_relaxed);
    const uint32_t round = m.barrier_round.load(std::memory_order_relaxed);
    if (m.num_arrived.fetch_add(1, std::memory_order_acq_rel) == n - 1) {
        m.num_arrived.store(0, std::memory_order_relaxed);
        m.stopping.store(m.aborted.load(std::memory_order_relaxed), std::memory_order_relaxed);
        m.barrier_round.store(round + 1, std::memory_order_release);
    } else {
        int spins = 0;
        while (m.barrier_round.load(std::memory_order_acquire) == round) relax(spins);
    }
    return m.stopping.load(std::memory_order_relaxed);
}

// Hands out `count` jobs in pieces; a thread that has lost its core holds up one piece only.
template <class Work> inline void share(Model &m, int phase, int count, int piece, Work work) {
    if (m.pass.num_threads == 1) {
        for (int i = 0; i < count; i += piece) {
            if (*m.pass.abort) {
                m.aborted.store(true, std::memory_order_relaxed);
                return;
            }
            work(i, i + piece < count ? i + piece : count);
        }
        return;
    }
    std::atomic<int> &next = m.next_job[phase];
    for (;;) {
        const int i = next.fetch_add(piece, std::memory_order_relaxed);
        if (i >= count) return;
        if (*m.pass.abort) m.aborted.store(true, std::memory_order_relaxed);
        if (m.aborted.load(std::memory_order_relaxed)) return;
        work(i, i + piece < count ? i + piece : count);
    }
}

inline int piece_of(int count, int num_threads) {
    const int piece = count / (num_threads * 6);
    return piece < 1 ? 1 : piece > 16 ? 16 : piece;
}

inline void norm_row(const float *x, const float *weight, int width, float eps, float *out) {
    v16f sum = v16f{};
    for (int i = 0; i < width; i += 16) {
        const v16f v = load(x + i);
        sum += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum_of(sum) / width + eps);
    for (int i = 0; i < width; i += 16) store(out + i, load(x + i) * scale * load(weight + i));
}

inline void norm_quantize(const float *x, const float *weight, int width, float eps,
                          float *buffer, Activations &out, int row) {
    norm_row(x, weight, width, eps, buffer);
    out.put_row(row, buffer, width);
}

// The activations that a phase reads: normalised rows, by each thread for itself if they are few.
const Activations &normed(Model &m, int tid, int &phase, const float *x, const float *weight,
                          int rows) {
    const int d = m.s.hidden_size;
    if (rows <= kPrivateRows) {
        for (int r = 0; r < rows; r++)
            norm_quantize(x + (size_t)r * d, weight, d, m.s.rms_norm_eps, m.row_buffer[tid],
                          m.own[tid], r);
        return m.own[tid];
    }
    share(m, phase++, rows, 1, [&](int begin, int end) {
        for (int r = begin; r < end; r++)
            norm_quantize(x + (size_t)r * d, weight, d, m.s.rms_norm_eps, m.row_buffer[tid],
                          m.act, r);
    });
    barrier(m);
    return m.act;
}

// Rotates one head in place; halves, not pairs (GPT-NeoX order).
inline void rotate(float *x, const float *cos, const float *sin, int half) {
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

inline void norm_head(float *x, const float *weight, int dim, float eps) {
    if (weight) norm_row(x, weight, dim, eps, x);
}

// One key-value head of one row: normalise and rotate its key, put both into the cache.
void put_kv(Model &m, const Layer &layer, int li, int row, int head) {
    const int dim = m.s.head_dim, position = m.pass.positions[row], slot = m.pass.slots[row];
    float *base = m.qkv + (size_t)row * (m.q_dim() + 2 * m.kv_dim());
    float *key = base + m.q_dim() + head * dim;
    const float *value = base + m.q_dim() + m.kv_dim() + head * dim;
    norm_head(key, layer.k_norm, dim, m.s.rms_norm_eps);
    rotate(key, m.cos + (size_t)position * dim / 2, m.sin + (size_t)position * dim / 2, dim / 2);
    // Keys of 16 positions stand together, so that a dot product needs no sum over lanes.
    uint16_t *keys = m.key_cache(slot, li, head) + (size_t)(position / 16) * dim * 16 + position % 16;
    for (int i = 0; i < dim; i++) keys[i * 16] = _cvtss_sh(key[i], _MM_FROUND_TO_NEAREST_INT);
    uint16_t *values = m.value_cache(slot, li, head) + (size_t)position * dim;
    for (int i = 0; i < dim; i += 16) store_half(values + i, load(value + i));
}

// Scores of G query heads that share keys: [G][positions], scaled.
template <int G>
inline void score_heads(const uint16_t *keys, const float *const *query, int dim, int num_tiles,
                        float scale, float *scores, int stride) {
    for (int t = 0; t < num_tiles; t++) {
        const uint16_t *tile = keys + (size_t)t * dim * 16;
        v16f sum[G];
        for (int g = 0; g < G; g++) sum[g] = v16f{};
        for (int i = 0; i < dim; i++) {
            const v16f k = load_half(tile + i * 16);
            for (int g = 0; g < G; g++) sum[g] += k * query[g][i];
        }
        for (int g = 0; g < G; g++) store(scores + (size_t)g * stride + t * 16, sum[g] * scale);
    }
}

template <int G, int W>
inline void mix_values(const uint16_t *values, const float *scores, int stride, int dim, int count,
                       int at, float *const *out) {
    v16f sum[G][W];
    for (int g = 0; g < G; g++)
        for (int w = 0; w < W; w++) sum[g][w] = v16f{};
    for (int p = 0; p < count; p++) {
        const uint16_t *row = values + (size_t)p * dim + at;
        for (int w = 0; w < W; w++) {
            const v16f v = load_half(row + w * 16);
            for (int g = 0; g < G; g++) sum[g][w] += v * scores[(size_t)g * stride + p];
        }
    }
    for (int g = 0; g < G; g++)
        for (int w = 0; w < W; w++) store(out[g] + at + w * 16, sum[g][w]);
}

template <int G>
void attend_heads(Model &m, const uint16_t *keys, const uint16_t *values,
                  const float *const *query, float *const *out, int count, float *scores) {
    const int dim = m.s.head_dim, stride = (m.s.max_seq_len + 15) / 16 * 16;
    const int num_tiles = (count + 15) / 16;
    score_heads<G>(keys, query, dim, num_tiles, 1.0f / std::sqrt((float)dim), scores, stride);
    for (int g = 0; g < G; g++) {
        float *row = scores + (size_t)g * stride;
        for (int p = count; p < num_tiles * 16; p++) row[p] = -INFINITY;
        v16f most = splat(-INFINITY);
        for (int t = 0; t < num_tiles; t++) most = larger(most, load(row + t * 16));
        const float peak = max_of(most);
        v16f sum = v16f{};
        for (int t = 0; t < num_tiles; t++) {
            v16f e = vexp(load(row + t * 16) - peak);
            if (t == num_tiles - 1)
                for (int p = count - t * 16; p < 16; p++) e[p] = 0.0f;
            store(row + t * 16, e);
            sum += e;
        }
        const float inverse = 1.0f / sum_of(sum);
        for (int t = 0; t < num_tiles; t++) store(row + t * 16, load(row + t * 16) * inverse);
    }
    int at = 0;
    for (; at + 64 <= dim; at += 64)
        mix_values<G, 4>(values, scores, stride, dim, count, at, out);
    for (; at < dim; at += 16) mix_values<G, 1>(values, scores, stride, dim, count, at, out);
}

// One key-value head of one row: attention of the query heads that share it, quantized.
void attend(Model &m, const Layer &layer, int li, int row, int head, int tid) {
    const int dim = m.s.head_dim, position = m.pass.positions[row], slot = m.pass.slots[row];
    const int num = m.heads_a_kv(), first = head * num;
    float *base = m.qkv + (size_t)row * (m.q_dim() + 2 * m.kv_dim());
    float *result = m.attn_raw + (size_t)row * m.q_dim();
    const float *cos = m.cos + (size_t)position * dim / 2;
    const float *sin = m.sin + (size_t)position * dim / 2;
    for (int h = first; h < first + num; h++) {
        norm_head(base + h * dim, layer.q_norm, dim, m.s.rms_norm_eps);
        rotate(base + h * dim, cos, sin, dim / 2);
    }
    const uint16_t *keys = m.key_cache(slot, li, head), *values = m.value_cache(slot, li, head);
    for (int h = first; h < first + num;) {
        const float *query[4];
        float *out[4];
        const int left = first + num - h, count = left >= 4 ? 4 : left;
        for (int g = 0; g < count; g++) {
            query[g] = base + (h + g) * dim;
            out[g] = result + (h + g) * dim;
        }
        switch (count) {
            case 1: attend_heads<1>(m, keys, values, query, out, position + 1, m.scores[tid]); break;
            case 2: attend_heads<2>(m, keys, values, query, out, position + 1, m.scores[tid]); break;
            case 3: attend_heads<3>(m, keys, values, query, out, position + 1, m.scores[tid]); break;
            default: attend_heads<4>(m, keys, values, query, out, position + 1, m.scores[tid]);
        }
        h += count;
    }
    for (int at = first * dim; at < (first + num) * dim; at += kGroup)
        m.attn.put(row, at, load(result + at), load(result + at + 16));
}

// out[row][at...] (+)= matrix x activations, for tiles begin to end.
inline void project(const Matrix &w, const Activations &act, int num_rows, int begin, int end,
                    const float *bias, bool add, float *out, size_t stride) {
    for (int tile = begin; tile < end; tile++)
        for (int row = 0; row < num_rows; row += kRowBlock) {
            v16f sums[kRowBlock];
            const int count = num_rows - row < kRowBlock ? num_rows - row : kRowBlock;
            tile_sums(w, tile, act, row, count, sums);
            for (int r = 0; r < count; r++) {
                float *to = out + (row + r) * stride + tile * kTile;
                if (add) sums[r] += load(to);
                if (bias) sums[r] += load(bias + tile * kTile);
                store(to, sums[r]);
            }
        }
}

inline void gate_up(Model &m, const Layer &layer, const Activations &act, int num_rows, int begin,
                    int end) {
    // Two tiles make one group of the next matrix's input.
    for (int pair = begin; pair < end; pair++)
        for (int row = 0; row < num_rows; row += kRowBlock) {
            v16f gate[2][kRowBlock], up[2][kRowBlock];
            const int count = num_rows - row < kRowBlock ? num_rows - row : kRowBlock;
            for (int i = 0; i < 2; i++) {
                tile_sums(layer.gate, pair * 2 + i, act, row, count, gate[i]);
                tile_sums(layer.up, pair * 2 + i, act, row, count, up[i]);
            }
            for (int r = 0; r < count; r++) {
                v16f h[2];
                for (int i = 0; i < 2; i++)
                    h[i] = gate[i][r] / (vexp(-gate[i][r]) + 1.0f) * up[i][r];
                m.ffn.put(row + r, pair * kGroup, h[0], h[1]);
            }
        }
}

// The part of one thread in a pass. Once aborted, all threads return after the same barrier.
void run_pass(Model &m, int tid) {
    const Pass &pass = m.pass;
    const int rows = pass.num_rows, threads = pass.num_threads, d = m.s.hidden_size;
    const int q_tiles = m.q_dim() / kTile, kv_tiles = m.kv_dim() / kTile;
    const size_t qkv_stride = m.q_dim() + 2 * m.kv_dim();
    int phase = 0;
    share(m, phase++, rows, 1, [&](int begin, int end) {
        for (int r = begin; r < end; r++)
            dequantize_row(m.embedding, pass.tokens[r], m.x + (size_t)r * d);
    });
    if (barrier(m)) return;
    for (int li = 0; li < m.s.num_layers; li++) {
        const Layer &layer = m.layers[li];
        {
            const Activations &act = normed(m, tid, phase, m.x, layer.attn_norm, rows);
            const int tiles = q_tiles + 2 * kv_tiles;
            share(m, phase++, tiles, piece_of(tiles, threads), [&](int begin, int end) {
                for (int t = begin; t < end; t++) {
                    const bool is_q = t < q_tiles, is_k = t < q_tiles + kv_tiles;
                    const Matrix &w = is_q ? layer.q : is_k ? layer.k : layer.v;
                    const int first = is_q ? 0 : is_k ? q_tiles : q_tiles + kv_tiles;
                    project(w, act, rows, t - first, t - first + 1,
                            layer.bias ? layer.bias + first * kTile : nullptr, false,
                            m.qkv + first * kTile, qkv_stride);
                }
            });
            if (barrier(m)) return;
        }
        const int kv_heads = m.s.num_kv_heads;
        if (!pass.one_row_a_slot) {
            share(m, phase++, rows * kv_heads, 1, [&](int begin, int end) {
                for (int j = begin; j < end; j++) put_kv(m, layer, li, j / kv_heads, j % kv_heads);
            });
            if (barrier(m)) return;
        }
        share(m, phase++, rows * kv_heads, 1, [&](int begin, int end) {
            for (int j = begin; j < end; j++) {
                // Late rows see more: they go first, so that the last pieces are short.
                const int row = rows - 1 - j / kv_heads, head = j % kv_heads;
                if (pass.one_row_a_slot) put_kv(m, layer, li, row, head);
                attend(m, layer, li, row, head, tid);
            }
        });
        if (barrier(m)) return;
        const int out_tiles = d / kTile;
        share(m, phase++, out_tiles, piece_of(out_tiles, threads), [&](int begin, int end) {
            project(layer.o, m.attn, rows, begin, end, nullptr, true, m.x, d);
        });
        if (barrier(m)) return;
        {
            const Activations &act = normed(m, tid, phase, m.x, layer.ffn_norm, rows);
            const int pairs = m.s.intermediate_size / kGroup;
            share(m, phase++, pairs, piece_of(pairs, threads), [&](int begin, int end) {
                gate_up(m, layer, act, rows, begin, end);
            });
            if (barrier(m)) return;
        }
        share(m, phase++, out_tiles, piece_of(out_tiles, threads), [&](int begin, int end) {
            project(layer.down, m.ffn, rows, begin, end, nullptr, true, m.x, d);
        });
        if (barrier(m)) return;
    }
    // The head, for the rows whose logits are wanted, eight at a time.
    const Matrix &head = m.tied ? m.embedding : m.head;
    int wanted[kMaxRows], num_wanted = 0;
    for (int r = 0; r < rows; r++)
        if (pass.wanted[r]) wanted[num_wanted++] = r;
    for (int at = 0; at < num_wanted; at += kRowBlock) {
        const int count = num_wanted - at < kRowBlock ? num_wanted - at : kRowBlock;
        for (int r = 0; r < count; r++)
            norm_quantize(m.x + (size_t)wanted[at + r] * d, m.final_norm, d, m.s.rms_norm_eps,
                          m.row_buffer[tid], m.own[tid], r);
        share(m, phase++, head.num_tiles, piece_of(head.num_tiles, threads),
              [&](int begin, int end) {
                  for (int tile = begin; tile < end; tile++) {
                      v16f sums[kRowBlock];
                      tile_sums(head, tile, m.own[tid], 0, count, sums);
                      const int first = tile * kTile;
                      const int width = m.s.vocab_size - first < kTile ? m.s.vocab_size - first
                                                                       : kTile;
                      for (int r = 0; r < count; r++)
                          memcpy(pass.logits + (size_t)(at + r) * m.s.vocab_size + first, &sums[r],
                                 width * sizeof(float));
                  }
              });
        // The next block's rows are of this thread alone: no barrier before them.
    }
}

double now_s() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

struct Worker {
    Model *model;
    int tid;
};

void *work(void *arg) {
    const Worker worker = *(Worker *)arg;
    delete (Worker *)arg;
    Model &m = *worker.model;
    uint32_t seen = 0;
    for (;;) {
        // The next token usually comes within a tenth of a millisecond; a sleep costs as much.
        const double until = now_s() + 100e-6;
        int spins = 0;
        while (m.generation.load(std::memory_order_acquire) == seen && !m.closing) {
            _mm_pause();
            if (++spins % 64 == 0 && now_s() > until) break;
        }
        if (m.generation.load(std::memory_order_acquire) == seen && !m.closing) {
            pthread_mutex_lock(&m.lock);
            m.num_sleeping++;
            while (m.generation.load(std::memory_order_acquire) == seen && !m.closing)
                pthread_cond_wait(&m.wake, &m.lock);
            m.num_sleeping--;
            pthread_mutex_unlock(&m.lock);
        }
        if (m.closing) return nullptr;
        seen = m.generation.load(std::memory_order_acquire);
        if (worker.tid < m.pass.num_threads) run_pass(m, worker.tid);
        m.num_left.fetch_sub(1, std::memory_order_acq_rel);
    }
}

int run_all(Model &m) {
    m.aborted.store(false, std::memory_order_relaxed);
    if (m.num_started && m.pass.num_threads > 1) {
        for (int i = 0; i < m.num_phases; i++) m.next_job[i].store(0, std::memory_order_relaxed);
        m.num_arrived.store(0, std::memory_order_relaxed);
        m.num_left.store(m.num_started, std::memory_order_relaxed);
        pthread_mutex_lock(&m.lock);
        m.generation.fetch_add(1, std::memory_order_release);
        if (m.num_sleeping) pthread_cond_broadcast(&m.wake);
        pthread_mutex_unlock(&m.lock);
        run_pass(m, 0);
        int spins = 0;
        while (m.num_left.load(std::memory_order_acquire)) relax(spins);
    } else {
        run_pass(m, 0);
    }
    return m.aborted ? -1 : 0;
}

float *copy_floats(const float *from, size_t count) {
    float *to = allocate<float>(count);
    if (to && from) memcpy(to, from, count * sizeof(float));
    return to;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API void albor_cpu_free(Model *m) {
    if (!m) return;
    m->closing = true;
    pthread_mutex_lock(&m->lock);
    pthread_cond_broadcast(&m->wake);
    pthread_mutex_unlock(&m->lock);
    for (int i = 0; i < m->num_started; i++) pthread_join(m->threads[i], nullptr);
    if (m->layers)
        for (int i = 0; i < m->s.num_layers; i++) {
            Layer &l = m->layers[i];
            for (Matrix *w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) w->release();
            for (float *p : {l.attn_norm, l.ffn_norm, l.q_norm, l.k_norm, l.bias}) free(p);
        }
    delete[] m->layers;
    m->embedding.release();
    m->head.release();
    m->act.release();
    m->attn.release();
    m->ffn.release();
    for (int i = 0; i < kMaxThreads; i++) {
        m->own[i].release();
        free(m->scores[i]);
        free(m->row_buffer[i]);
    }
    for (float *p : {m->final_norm, m->cos, m->sin, m->x, m->qkv, m->attn_raw}) free(p);
    free(m->keys);
    free(m->values);
    delete[] m->next_job;
    delete m;
}

API Model *albor_cpu_new(const Shape *shape) {
    Model *m = new (std::nothrow) Model();
    if (!m) return nullptr;
    m->s = *shape;
    const Shape &s = m->s;
    const size_t tokens = (s.max_seq_len + 15) / 16 * 16;
    m->k_head = m->v_head = tokens * s.head_dim;
    const size_t cache = (size_t)s.num_slots * s.num_layers * s.num_kv_heads * m->k_head;
    m->layers = new (std::nothrow) Layer[s.num_layers];
    // Not touched here: pages of the caches are the system's until a token needs them.
    m->keys = (uint16_t *)calloc(cache + 64, 2);
    m->values = (uint16_t *)calloc(cache + 64, 2);
    m->x = allocate<float>((size_t)kMaxRows * s.hidden_size);
    m->qkv = allocate<float>((size_t)kMaxRows * (m->q_dim() + 2 * m->kv_dim()));
    m->attn_raw = allocate<float>((size_t)kMaxRows * m->q_dim());
    m->num_phases = 1 + 8 * s.num_layers + kMaxRows / kRowBlock + 2;
    m->next_job = new (std::nothrow) std::atomic<int>[m->num_phases];
    bool ok = m->layers && m->keys && m->values && m->x && m->qkv && m->attn_raw && m->next_job;
    ok = ok && m->act.allocate_rows(kMaxRows, s.hidden_size);
    ok = ok && m->attn.allocate_rows(kMaxRows, m->q_dim());
    ok = ok && m->ffn.allocate_rows(kMaxRows, s.intermediate_size);
    for (int i = 0; ok && i < s.max_threads; i++) {
        ok = m->own[i].allocate_rows(kRowBlock, s.hidden_size);
        m->scores[i] = allocate<float>(4 * tokens);
        m->row_buffer[i] = allocate<float>(s.hidden_size);
        ok = ok && m->scores[i] && m->row_buffer[i];
    }
    for (int i = 1; ok && i < s.max_threads; i++) {
        Worker *worker = new (std::nothrow) Worker{m, i};
        ok = worker && !pthread_create(&m->threads[i - 1], nullptr, work, worker);
        if (ok) m->num_started++;
    }
    if (!ok) {
        albor_cpu_free(m);
        return nullptr;
    }
    return m;
}

API int albor_cpu_set_matrix(Model *m, int layer, int which, int bits, int rows, int cols,
                             const uint8_t *blocks) {
    Matrix *w = nullptr;
    if (layer < 0) {
        w = which ? &m->head : &m->embedding;
        if (which) m->tied = false;
    } else {
        Layer &l = m->layers[layer];
        Matrix *all[] = {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down};
        w = all[which];
    }
    return repack(*w, bits, rows, cols, blocks) ? 0 : -1;
}

API int albor_cpu_set_vector(Model *m, int layer, int which, int count, const float *values) {
    float **to;
    if (layer < 0) {
        float **all[] = {&m->final_norm, &m->cos, &m->sin};
        to = all[which];
    } else {
        Layer &l = m->layers[layer];
        float **all[] = {&l.attn_norm, &l.ffn_norm, &l.q_norm, &l.k_norm, &l.bias};
        to = all[which];
    }
    free(*to);
    *to = copy_floats(values, count);
    return *to ? 0 : -1;
}

// Returns how many of the `count` tokens are in the caches now; fewer than all only when aborted.
API int albor_cpu_extend(Model *m, int count, const int32_t *tokens, const int32_t *slots,
                         const int32_t *positions, const int8_t *wanted, float *logits,
                         int num_threads, const volatile uint8_t *abort) {
    Pass &pass = m->pass;
    pass.abort = abort;
    pass.num_threads = num_threads > m->num_started + 1 ? m->num_started + 1 : num_threads;
    for (int at = 0; at < count; at += kMaxRows) {
        pass.tokens = tokens + at;
        pass.slots = slots + at;
        pass.positions = positions + at;
        pass.wanted = wanted + at;
        pass.logits = logits;
        pass.num_rows = count - at < kMaxRows ? count - at : kMaxRows;
        pass.one_row_a_slot = true;
        for (int r = 1; r < pass.num_rows; r++)
            if (pass.slots[r] == pass.slots[r - 1]) pass.one_row_a_slot = false;
        if (run_all(*m)) return at;
        for (int r = 0; r < pass.num_rows; r++)
            if (pass.wanted[r]) logits += m->s.vocab_size;
    }
    return count;
}

// Copies the first `length` tokens of one slot's cache to another's.
API void albor_cpu_fork(Model *m, int src, int dst, int length) {
    const size_t keys = (size_t)(length + 15) / 16 * 16 * m->s.head_dim;
    const size_t values = (size_t)length * m->s.head_dim;
    for (int layer = 0; layer < m->s.num_layers; layer++)
        for (int head = 0; head < m->s.num_kv_heads; head++) {
            memcpy(m->key_cache(dst, layer, head), m->key_cache(src, layer, head), keys * 2);
            memcpy(m->value_cache(dst, layer, head), m->value_cache(src, layer, head), values * 2);
        }
}

API int64_t albor_cpu_weight_bytes(const Model *m) {
    int64_t total = (m->tied ? m->embedding : m->head).bytes();
    for (int i = 0; i < m->s.num_layers; i++) {
        const Layer &l = m->layers[i];
        for (const Matrix *w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down})
            total += w->bytes();
    }
    return total;
}

API int albor_cpu_version(void) { return 1; }

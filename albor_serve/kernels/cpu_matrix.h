// Weight matrices in tiles, activations in 8 bits, and their product: what takes the time.
#pragma once

#include <stdlib.h>

#include "cpu_simd.h"

namespace {

constexpr int kTile = 16;   // output rows that are computed together, one per vector lane
constexpr int kGroup = 32;  // inputs that share a scale
#if defined(__AVX512VNNI__)
constexpr int kRowBlock = 8;  // tokens whose sums are held in registers at once
#else
constexpr int kRowBlock = 4;
#endif

// Bytes of a tile's weights for one group of inputs.
constexpr size_t group_bytes(int bits) { return bits == 4 ? 256 : 512; }

// What a stored weight is above its value, to be unsigned as the dot products want it: taken back
// through the activations' sum. Plain AVX2 multiplies signed bytes by moving their sign instead.
constexpr int shift_of(int bits) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    return bits == 4 ? 8 : 128;
#else
    return bits == 4 ? 8 : 0;
#endif
}

inline int32_t four_bytes(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return four;
}

template <class T> T *allocate(size_t count) {
    void *p = nullptr;
    const size_t bytes = (count * sizeof(T) + 64 + 4095) / 4096 * 4096;
    if (posix_memalign(&p, 4096, bytes)) return nullptr;
    memset(p, 0, bytes);
    return (T *)p;
}

// A weight matrix [rows, cols] in tiles of 16 output rows. For each tile and group of 32 inputs:
// `quants` holds, for every four inputs, their bytes of 16 rows (Q4_0: inputs i and i + 16 share
// a byte, as on disk), `scales` holds 16 float16.
struct Matrix {
    int bits = 0, rows = 0, cols = 0, num_tiles = 0, num_groups = 0;
    uint8_t *quants = nullptr;
    uint16_t *scales = nullptr;
    size_t bytes() const { return (size_t)num_tiles * num_groups * (group_bytes(bits) + 32); }
    void release() {
        free(quants);
        free(scales);
        quants = nullptr;
        scales = nullptr;
        bits = 0;
    }
};

bool repack(Matrix &m, int bits, int rows, int cols, const uint8_t *blocks) {
    m.release();
    m.bits = bits;
    m.rows = rows;
    m.cols = cols;
    m.num_tiles = (rows + kTile - 1) / kTile;
    m.num_groups = cols / kGroup;
    m.quants = allocate<uint8_t>((size_t)m.num_tiles * m.num_groups * group_bytes(m.bits));
    m.scales = allocate<uint16_t>((size_t)m.num_tiles * m.num_groups * kTile);
    if (!m.quants || !m.scales) return false;
    const int quads = bits == 4 ? 4 : 8;
    const size_t block = 2 + quads * 4;
    for (int row = 0; row < rows; row++) {
        const int tile = row / kTile, lane = row % kTile;
        const uint8_t *in = blocks + (size_t)row * m.num_groups * block;
        for (int g = 0; g < m.num_groups; g++, in += block) {
            const size_t at = (size_t)tile * m.num_groups + g;
            memcpy(&m.scales[at * kTile + lane], in, 2);
            uint8_t *out = m.quants + at * group_bytes(m.bits) + lane * 4;
            for (int q = 0; q < quads; q++)
                for (int i = 0; i < 4; i++) {
                    const uint8_t byte = in[2 + q * 4 + i];
                    out[q * 64 + i] = bits == 4 ? byte : (uint8_t)(byte + shift_of(8));
                }
        }
    }
    return true;
}

float half_to_float(uint16_t h) { return _cvtsh_ss(h); }

// Row `row` of a matrix as float32 [cols].
void dequantize_row(const Matrix &m, int row, float *out) {
    const int tile = row / kTile, lane = row % kTile;
    for (int g = 0; g < m.num_groups; g++) {
        const size_t at = (size_t)tile * m.num_groups + g;
        const float scale = half_to_float(m.scales[at * kTile + lane]);
        const uint8_t *in = m.quants + at * group_bytes(m.bits) + lane * 4;
        for (int i = 0; i < kGroup; i++) {
            int value;
            if (m.bits == 4) {
                const uint8_t byte = in[(i % 16) / 4 * 64 + i % 4];
                value = (i < 16 ? byte & 15 : byte >> 4) - shift_of(4);
            } else {
                const uint8_t byte = in[i / 4 * 64 + i % 4];
                value = shift_of(8) ? (int)byte - shift_of(8) : (int)(int8_t)byte;
            }
            out[g * kGroup + i] = scale * value;
        }
    }
}

// Rows of activations as 8-bit integers: x = quants * scale, a scale for each 32.
struct Activations {
    int stride = 0;  // inputs for each row
    int8_t *quants = nullptr;
    float *scales = nullptr;
    int32_t *sums = nullptr;  // of the group's quants
    bool allocate_rows(int rows, int width) {
        stride = width;
        quants = allocate<int8_t>((size_t)rows * width);
        scales = allocate<float>((size_t)rows * width / kGroup);
        sums = allocate<int32_t>((size_t)rows * width / kGroup);
        return quants && scales && sums;
    }
    void release() {
        free(quants);
        free(scales);
        free(sums);
    }
    // One group of 32 values at input `at` of row `row`.
    void put(int row, int at, v16f a, v16f b) {
        const v16f mag = larger(larger(a, -a), larger(b, -b));
        const float scale = max_of(mag) / 127.0f;
        const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        const v16i qa = to_int(a * inverse), qb = to_int(b * inverse);
        int8_t *q = quants + (size_t)row * stride + at;
        store_bytes(q, qa);
        store_bytes(q + 16, qb);
        const size_t g = ((size_t)row * stride + at) / kGroup;
        scales[g] = scale;
        sums[g] = sum_of(qa + qb);
    }
    void put_row(int row, const float *x, int width) {
        for (int at = 0; at < width; at += kGroup) put(row, at, load(x + at), load(x + at + 16));
    }
};

// Sums of one tile for R rows of activations: out[r][lane] = sum of weight x activation.
#if defined(__AVX512VNNI__)
template <int R, int BITS>
inline __attribute__((always_inline)) void tile_rows(const Matrix &m, int tile,
                                                     const Activations &act, int row, v16f *out) {
    const int num_groups = m.num_groups, stride = act.stride, gstride = stride / kGroup;
    constexpr size_t kBytes = group_bytes(BITS);
    const uint8_t *weights = m.quants + (size_t)tile * num_groups * kBytes;
    const uint16_t *wscale = m.scales + (size_t)tile * num_groups * kTile;
    const int8_t *a = act.quants + (size_t)row * stride;
    const float *ascale = act.scales + (size_t)row * gstride;
    const int32_t *asum = act.sums + (size_t)row * gstride;
    const __m512i nibble = _mm512_set1_epi8(15);
    v16f total[R];
    for (int r = 0; r < R; r++) total[r] = v16f{};
    for (int g = 0; g < num_groups; g++, weights += kBytes, a += kGroup) {
        if (R <= 2)  // weights come from memory then: ask for them early
            for (size_t i = 0; i < kBytes; i += 64)
                _mm_prefetch((const char *)weights + 8 * kBytes + i, _MM_HINT_T0);
        __m512i sum[R];
        for (int r = 0; r < R; r++)
            sum[r] = _mm512_set1_epi32(-shift_of(BITS) * asum[r * gstride + g]);
        for (int q = 0; q < (BITS == 4 ? 4 : 8); q++) {
            const __m512i w = _mm512_loadu_si512(weights + q * 64);
            const __m512i lo = BITS == 4 ? _mm512_and_si512(w, nibble) : w;
            const __m512i hi = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
            for (int r = 0; r < R; r++) {
                const int8_t *x = a + (size_t)r * stride + q * 4;
                sum[r] = _mm512_dpbusd_epi32(sum[r], lo, _mm512_set1_epi32(four_bytes(x)));
                if (BITS == 4)
                    sum[r] = _mm512_dpbusd_epi32(sum[r], hi, _mm512_set1_epi32(four_bytes(x + 16)));
            }
        }
        const v16f scale = load_half(wscale + g * kTile);
        for (int r = 0; r < R; r++)
            total[r] += to_float((v16i)sum[r]) * (scale * ascale[r * gstride + g]);
    }
    for (int r = 0; r < R; r++) out[r] = total[r];
}
#else
// sum of eight lanes' four products each, for half a tile. AVX-VNNI has one instruction for it;
// AVX2 adds pairs in 16 bits first: eight pairs of nibble x activation are at most 30,480.
template <int R, int BITS>
inline __attribute__((always_inline)) void half_tile_rows(const uint8_t *weights,
                                                          const uint16_t *wscale, int num_groups,
                                                          const Activations &act, int row,
                                                          v8f *total) {
    const int stride = act.stride, gstride = stride / kGroup;
    constexpr size_t kBytes = group_bytes(BITS);
    const int8_t *a = act.quants + (size_t)row * stride;
    const float *ascale = act.scales + (size_t)row * gstride;
    const int32_t *asum = act.sums + (size_t)row * gstride;
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int r = 0; r < R; r++) total[r] = v8f{};
    for (int g = 0; g < num_groups; g++, weights += kBytes, a += kGroup) {
        __m256i sum[R];
        for (int r = 0; r < R; r++) {
#if defined(__AVXVNNI__)
            sum[r] = _mm256_set1_epi32(-shift_of(BITS) * asum[r * gstride + g]);
#else
            sum[r] = _mm256_setzero_si256();
#endif
        }
        for (int q = 0; q < (BITS == 4 ? 4 : 8); q++) {
            const __m256i w = _mm256_loadu_si256((const __m256i *)(weights + q * 64));
            const __m256i lo = BITS == 4 ? _mm256_and_si256(w, nibble) : w;
            const __m256i hi = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
            for (int r = 0; r < R; r++) {
                const int8_t *at = a + (size_t)r * stride + q * 4;
                const __m256i x = _mm256_set1_epi32(four_bytes(at));
                const __m256i y = _mm256_set1_epi32(BITS == 4 ? four_bytes(at + 16) : 0);
#if defined(__AVXVNNI__)
                sum[r] = _mm256_dpbusd_avx_epi32(sum[r], lo, x);
                if (BITS == 4) sum[r] = _mm256_dpbusd_avx_epi32(sum[r], hi, y);
#else
                if (BITS == 4) {
                    sum[r] = _mm256_add_epi16(sum[r], _mm256_maddubs_epi16(lo, x));
                    sum[r] = _mm256_add_epi16(sum[r], _mm256_maddubs_epi16(hi, y));
                } else {
                    const __m256i pairs =
                        _mm256_maddubs_epi16(_mm256_abs_epi8(lo), _mm256_sign_epi8(x, lo));
                    sum[r] = _mm256_add_epi32(sum[r],
                                              _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                }
#endif
            }
        }
        const v8f scale = (v8f)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(wscale + g * kTile)));
        for (int r = 0; r < R; r++) {
#if !defined(__AVXVNNI__)
            if (BITS == 4)
                sum[r] = _mm256_add_epi32(_mm256_madd_epi16(sum[r], _mm256_set1_epi16(1)),
                                          _mm256_set1_epi32(-shift_of(4) * asum[r * gstride + g]));
#endif
            total[r] += (v8f)_mm256_cvtepi32_ps(sum[r]) * (scale * ascale[r * gstride + g]);
        }
    }
}

template <int R, int BITS>
inline __attribute__((always_inline)) void tile_rows(const Matrix &m, int tile,
                                                     const Activations &act, int row, v16f *out) {
    const uint8_t *weights = m.quants + (size_t)tile * m.num_groups * group_bytes(BITS);
    const uint16_t *wscale = m.scales + (size_t)tile * m.num_groups * kTile;
    for (int half = 0; half < 2; half++) {
        v8f total[R];
        half_tile_rows<R, BITS>(weights + half * 32, wscale + half * 8, m.num_groups, act, row,
                                total);
        for (int r = 0; r < R; r++) memcpy((char *)&out[r] + half * 32, &total[r], 32);
    }
}
#endif

template <int BITS>
inline void tile_block(const Matrix &m, int tile, const Activations &act, int row, int count,
                       v16f *out) {
    switch (count) {
        case 1: return tile_rows<1, BITS>(m, tile, act, row, out);
        case 2: return tile_rows<2, BITS>(m, tile, act, row, out);
        case 3: return tile_rows<3, BITS>(m, tile, act, row, out);
        case 4: return tile_rows<4, BITS>(m, tile, act, row, out);
#if defined(__AVX512VNNI__)
        case 5: return tile_rows<5, BITS>(m, tile, act, row, out);
        case 6: return tile_rows<6, BITS>(m, tile, act, row, out);
        case 7: return tile_rows<7, BITS>(m, tile, act, row, out);
        default: return tile_rows<8, BITS>(m, tile, act, row, out);
#endif
    }
}

inline void tile_sums(const Matrix &m, int tile, const Activations &act, int row, int count,
                      v16f *out) {
    if (m.bits == 4)
        tile_block<4>(m, tile, act, row, count, out);
    else
        tile_block<8>(m, tile, act, row, count, out);
}

}  // namespace

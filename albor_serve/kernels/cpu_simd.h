// Vectors of 16 numbers on AVX-512 (one register) and AVX2 (two).
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <cmath>

namespace {

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef float v8f __attribute__((vector_size(32)));

inline v16f splat(float x) { return v16f{} + x; }
inline v16f load(const float *p) {
    v16f v;
    memcpy(&v, p, 64);
    return v;
}
inline void store(float *p, v16f v) { memcpy(p, &v, 64); }

#if defined(__AVX512F__)
inline v16f load_half(const uint16_t *p) {
    return (v16f)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
inline void store_half(uint16_t *p, v16f v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
inline v16f to_float(v16i v) { return (v16f)_mm512_cvtepi32_ps((__m512i)v); }
inline v16i to_int(v16f v) { return (v16i)_mm512_cvtps_epi32((__m512)v); }  // nearest, ties even
inline float sum_of(v16f v) { return _mm512_reduce_add_ps((__m512)v); }
inline int32_t sum_of(v16i v) { return _mm512_reduce_add_epi32((__m512i)v); }
inline void store_bytes(int8_t *p, v16i v) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
}
inline float max_of(v16f v) { return _mm512_reduce_max_ps((__m512)v); }
inline v16f larger(v16f a, v16f b) { return (v16f)_mm512_max_ps((__m512)a, (__m512)b); }
#else  // AVX2
inline v16f join(__m256 a, __m256 b) {
    v16f v;
    memcpy(&v, &a, 32);
    memcpy((char *)&v + 32, &b, 32);
    return v;
}
template <class T> inline __m256 low(T v) {
    __m256 h;
    memcpy(&h, &v, 32);
    return h;
}
template <class T> inline __m256 high(T v) {
    __m256 h;
    memcpy(&h, (char *)&v + 32, 32);
    return h;
}
inline v16f load_half(const uint16_t *p) {
    return join(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
}
inline void store_half(uint16_t *p, v16f v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(low(v), _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(high(v), _MM_FROUND_TO_NEAREST_INT));
}
inline v16f to_float(v16i v) { return __builtin_convertvector(v, v16f); }
inline v16i to_int(v16f v) {
    return (v16i)join((__m256)_mm256_cvtps_epi32(low(v)), (__m256)_mm256_cvtps_epi32(high(v)));
}
inline float sum_of(v16f v) {
    float s = 0;
    for (int i = 0; i < 8; i++) s += v[i] + v[i + 8];
    return s;
}
inline int32_t sum_of(v16i v) {
    int32_t s = 0;
    for (int i = 0; i < 16; i++) s += v[i];
    return s;
}
inline void store_bytes(int8_t *p, v16i v) {
    for (int i = 0; i < 16; i++) p[i] = (int8_t)v[i];
}
inline v16f larger(v16f a, v16f b) {
    return join(_mm256_max_ps(low(a), low(b)), _mm256_max_ps(high(a), high(b)));
}
inline float max_of(v16f v) {
    float m = v[0];
    for (int i = 1; i < 16; i++) m = v[i] > m ? v[i] : m;
    return m;
}
#endif

// e to the x, relative error below 2e-7, for -87 to 88 and clamped there (Cephes' polynomial).
inline v16f vexp(v16f x) {
    x = larger(-larger(-x, splat(-88.0f)), splat(-87.0f));
    const v16f magic = splat(12582912.0f);
    v16f n = x * 1.44269504088896341f + magic;
    const v16i bits = (v16i)n - 0x4B400000;
    n -= magic;
    const v16f f = x - n * 0.693359375f - n * -2.12194440e-4f;
    v16f p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return (v16f)((v16i)p + (bits << 23));
}

}  // namespace

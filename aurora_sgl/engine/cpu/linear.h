// Linear layers of a decoding step, y = x w^T + b, with the weight as the checkpoint has it.
//
// Few rows are bound by reading the weight once, so it is read in place, [out, in]: no packed copy
// to hold, and none to make again when a hot swap changes it. A bfloat16 is the upper half of a
// float32: a register of them becomes two of float32 by a shift and a mask (even elements, odd
// elements), which costs less than reading twice as many bytes. Processors with AVX-512 bfloat16
// multiply pairs of them directly. All sums are float32, and every sum of a row and an output is
// added up in one order, whatever the number of rows: a token verified among others gets the same
// logits as a token decoded alone.

#pragma once

#include "numbers.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kFew = 6, kMany = 8;  // rows by 4 or 3 outputs: 24 of 32 registers
#else
constexpr int kLanes = 8, kFew = 2, kMany = 3;  // 8 or 9 of 16
#endif
constexpr int kOuts = 4;            // outputs of one tile of few rows; of many rows, one less
constexpr int kPanel = 96;          // rows whose activations stay in the second cache
constexpr int kShare = 96;          // outputs that one thread takes at a time, also in that cache
constexpr int kWide = kShare + 16;  // floats between two rows of its sums
constexpr int kAhead = 8192;        // bytes: two pages

typedef float floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

// How weights of one kind meet activations: `kChunk` elements at a time, in `kParts` parts, with
// activations laid out anew by `put_chunk` so that they need no work in the inner loop.

struct Float32 {
  using Weight = float;
  using Stored = float;
  using Input = float;
  typedef floats Loaded;
  static constexpr int kChunk = kLanes, kParts = 1;
  static void put_chunk(const float* x, float* to) { *(floats*)to = *(const floats*)x; }
  template <int>
  static Loaded read(const float* w) {
    return *(const floats*)w;
  }
  static floats add(floats sum, Loaded w, const float* x) { return sum + w * *(const floats*)x; }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
  using Weight = uint16_t;
  using Stored = bf16;
  using Input = uint16_t;
  typedef __m512bh Loaded;
  static constexpr int kChunk = 32, kParts = 1;
  static void put_chunk(const uint16_t* x, uint16_t* to) { std::memcpy(to, x, 64); }
  template <int>
  static Loaded read(const uint16_t* w) {
    return (__m512bh)_mm512_loadu_si512(w);
  }
  static floats add(floats sum, Loaded w, const uint16_t* x) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, w, (__m512bh)_mm512_loadu_si512(x));
  }
};
#else
struct Bfloat16 {
  using Weight = uint16_t;
  using Stored = bf16;
  using Input = float;
  typedef floats Loaded;
  static constexpr int kChunk = 2 * kLanes, kParts = 2;  // even, then odd elements
  template <int part>
  static Loaded read(const uint16_t* w) {
    words bits = *(const words*)w;
    return part ? (floats)(bits & 0xffff0000u) : (floats)(bits << 16);
  }
  static void put_chunk(const uint16_t* x, float* to) {
    *(floats*)to = read<0>(x);
    *(floats*)(to + kLanes) = read<1>(x);
  }
  static floats add(floats sum, Loaded w, const float* x) { return sum + w * *(const floats*)x; }
};
#endif

inline four sums_of(const floats* v) {  // the sums over the floats of v[0..3]
#if defined(__AVX512F__)
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
    __m512d d = _mm512_castps_pd((__m512)v[i]);
    half[i] = _mm256_add_ps(_mm256_castpd_ps(_mm512_castpd512_pd256(d)),
                            _mm256_castpd_ps(_mm512_extractf64x4_pd(d, 1)));
  }
#elif defined(__AVX__)
  __m256 half[4];
  for (int i = 0; i < 4; ++i) half[i] = (__m256)v[i];
#endif
#if defined(__AVX__)
  __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  return (four)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
  four sums{};
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < kLanes; ++lane) sums[i] += v[i][lane];
  return sums;
#endif
}

// One part of one chunk of R rows and N outputs. The compiler is kept from mixing two parts: GCC 12
// then runs out of registers.
template <class Kind, int R, int N, int part>
__attribute__((always_inline)) inline void multiply(const typename Kind::Input* x,
                                                    const typename Kind::Weight* const* w,
                                                    int64_t at, floats (*sums)[4]) {
  typename Kind::Loaded loaded[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) loaded[n] = Kind::template read<part>(w[n] + at);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      sums[r][n] = Kind::add(sums[r][n], loaded[n], x + r * Kind::kChunk + part * kLanes);
  asm volatile("" ::: "memory");
}

// R rows and N outputs, all sums in registers; writes four sums of each row. `fresh`: these weights
// are read for the first time; what follows them is then fetched ahead, since the processor's own
// prefetching stops at every page (measured on Ice Lake: 0.7 of the time at 1 row, 0.6 at 4). From
// 4 rows on it goes to the second cache, since the first has too few lines under way. Never
// inlined: several in one function take 1.8 times as long for 4 rows.
template <class Kind, int R, int N, bool fresh>
__attribute__((noinline)) void tile(const typename Kind::Input* x,
                                    const typename Kind::Weight* const* w, int64_t in, float* out) {
  floats sums[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sums[r][n] = floats{};
  const int64_t whole = in / Kind::kChunk * Kind::kChunk;
  for (int64_t at = 0; at < whole; at += Kind::kChunk, x += R * Kind::kChunk) {
    if (fresh)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        __builtin_prefetch((const char*)(w[n] + at) + kAhead, 0, R < 4 ? 3 : 2);
    multiply<Kind, R, N, 0>(x, w, at, sums);
    if (Kind::kParts > 1) multiply<Kind, R, N, 1>(x, w, at, sums);
  }
  if (whole < in) {
    typename Kind::Weight rest[N][Kind::kChunk] = {};
    const typename Kind::Weight* from[N];
    for (int n = 0; n < N; ++n) {
      std::memcpy(rest[n], w[n] + whole, (in - whole) * sizeof(rest[0][0]));
      from[n] = rest[n];
    }
    multiply<Kind, R, N, 0>(x, from, 0, sums);
    if (Kind::kParts > 1) multiply<Kind, R, N, 1>(x, from, 0, sums);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) *(four*)(out + r * kWide) = sums_of(sums[r]);
}

template <class Kind, int N, bool fresh>
inline void tiles(const typename Kind::Input* x, const typename Kind::Weight* const* w, int64_t in,
                  int64_t rows, float* out) {
  switch (rows) {
    case 1: tile<Kind, 1, N, fresh>(x, w, in, out); break;
    case 2: tile<Kind, 2, N, fresh>(x, w, in, out); break;
    case 3: tile<Kind, 3, N, fresh>(x, w, in, out); break;
#if defined(__AVX512F__)
    case 4: tile<Kind, 4, N, fresh>(x, w, in, out); break;
    case 5: tile<Kind, 5, N, fresh>(x, w, in, out); break;
    case 6: tile<Kind, 6, N, fresh>(x, w, in, out); break;
    case 7: tile<Kind, 7, 3, fresh>(x, w, in, out); break;
    case 8: tile<Kind, 8, 3, fresh>(x, w, in, out); break;
#endif
  }
}

// Outputs begin..end of some rows, N at a time; kShare of them at most.
template <class Kind, int N, bool fresh>
inline void strip(const typename Kind::Input* x, const typename Kind::Weight* w, int64_t in,
                  const typename Kind::Weight* bias, typename Kind::Weight* y, int64_t y_stride,
                  int64_t rows, int64_t begin, int64_t end) {
  using Stored = typename Kind::Stored;
  alignas(64) float out[kMany * kWide];  // a tile writes four of each row, even where N is less
  for (int64_t n = begin; n < end; n += N) {
    const typename Kind::Weight* row[N];
    for (int i = 0; i < N; ++i) row[i] = w + std::min(n + i, end - 1) * in;
    tiles<Kind, N, fresh>(x, row, in, rows, out + (n - begin));
  }
  const Stored* added = (const Stored*)bias + begin;
  const int64_t count = end - begin;
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = out + r * kWide;
    Stored* to = (Stored*)y + r * y_stride + begin;
    if (bias) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) store(to + i, from[i] + load(added + i));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) store(to + i, from[i]);
    }
  }
}

// How many of these rows are multiplied at a time.
inline int64_t group(int64_t left) {
  return left > kFew && left <= kMany ? left : std::min<int64_t>(kFew, left);
}

// Outputs begin..end of all rows of a panel. The activations of some rows stay in the first cache
// while the weights pass by, which come from the second cache for all rows but the first.
template <class Kind>
void outputs(const typename Kind::Input* x, int64_t stride, const typename Kind::Weight* w,
             int64_t in, const typename Kind::Weight* bias, typename Kind::Weight* y,
             int64_t y_stride, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t r = 0, here; r < rows; r += here) {
    here = group(rows - r);
    const bool last = here > kFew;
    const auto run = last ? (r ? strip<Kind, kOuts - 1, false> : strip<Kind, kOuts - 1, true>)
                          : (r ? strip<Kind, kOuts, false> : strip<Kind, kOuts, true>);
    run(x + r * stride, w, in, bias, y + r * y_stride, y_stride, here, begin, end);
  }
}

// The next line of the cache: a load that lies across two of them costs two.
template <class T>
inline T* aligned(T* p) {
  return (T*)((uintptr_t(p) + 63) / 64 * 64);
}

// Rows that are multiplied together, a chunk of each after the other, the last one ended by zeros.
template <class Kind>
void prepare(const typename Kind::Weight* x, int64_t x_stride, int64_t rows, int64_t in,
             typename Kind::Input* to) {
  const int64_t whole = in / Kind::kChunk * Kind::kChunk;
  for (int64_t r = 0; r < rows; ++r, x += x_stride, to += Kind::kChunk) {
    for (int64_t at = 0; at < whole; at += Kind::kChunk) Kind::put_chunk(x + at, to + at * rows);
    if (whole < in) {
      typename Kind::Weight rest[Kind::kChunk] = {};
      std::memcpy(rest, x + whole, (in - whole) * sizeof(rest[0]));
      Kind::put_chunk(rest, to + whole * rows);
    }
  }
}

template <class Kind>
void linear_(const typename Kind::Weight* x, int64_t x_stride, const typename Kind::Weight* w,
             const typename Kind::Weight* bias, typename Kind::Weight* y, int64_t y_stride,
             int64_t rows, int64_t in, int64_t outs) {
  using Input = typename Kind::Input;
  const int64_t stride = (in + Kind::kChunk - 1) / Kind::kChunk * Kind::kChunk;
  thread_local std::vector<Input> memory;
  for (int64_t first = 0; first < rows; first += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, rows - first);
    if (int64_t(memory.size()) < count * stride + 64) memory.resize(count * stride + 64);
    Input* prepared = aligned(memory.data());
    for (int64_t r = 0, here; r < count; r += here) {
      here = group(count - r);
      prepare<Kind>(x + (first + r) * x_stride, x_stride, here, in, prepared + r * stride);
    }
    const int64_t shares = (outs + kShare - 1) / kShare;
    const bool many = double(in) * outs * (count + 8) > 1e6;  // a thread woken costs microseconds
#pragma omp parallel for schedule(static) if (many && shares > 1)
    for (int64_t share = 0; share < shares; ++share)
      outputs<Kind>(prepared, stride, w, in, bias, y + first * y_stride, y_stride, count,
                    share * kShare, std::min(outs, (share + 1) * kShare));
  }
}

// kind 0: float32, 1: bfloat16. Strides count elements between rows; w is contiguous; bias may be
// null.
inline void linear(int kind, const void* x, int64_t x_stride, const void* w, const void* bias,
                   void* y, int64_t y_stride, int64_t rows, int64_t in, int64_t outs) {
  if (kind == 0)
    linear_<Float32>((const float*)x, x_stride, (const float*)w, (const float*)bias, (float*)y,
                     y_stride, rows, in, outs);
  else
    linear_<Bfloat16>((const uint16_t*)x, x_stride, (const uint16_t*)w, (const uint16_t*)bias,
                      (uint16_t*)y, y_stride, rows, in, outs);
}

}  // namespace

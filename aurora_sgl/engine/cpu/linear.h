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
constexpr int kOuts = 4;       // outputs of one tile of few rows; of many rows, one less
constexpr int kPanel = 96;     // rows whose activations stay in the second cache
constexpr int kShare = 96;     // outputs that one thread takes at a time, also in that cache
constexpr int kAhead = 8192;   // bytes: two pages

typedef float floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

// How weights of one kind meet activations: `kChunk` elements at a time, activations laid out anew
// by `prepare` so that they need no work in the inner loop.

struct Float32 {
  using Weight = float;
  using Input = float;
  static constexpr int kChunk = kLanes;
  static void prepare(const float* x, int64_t in, float* to) { std::memcpy(to, x, 4 * in); }
  struct Loaded {
    floats all;
  };
  static Loaded read(const float* w) { return {*(const floats*)w}; }
  static floats add(floats sum, Loaded w, const float* x) { return sum + w.all * *(const floats*)x; }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
  using Weight = uint16_t;
  using Input = uint16_t;
  static constexpr int kChunk = 32;
  static void prepare(const uint16_t* x, int64_t in, uint16_t* to) { std::memcpy(to, x, 2 * in); }
  struct Loaded {
    __m512bh all;
  };
  static Loaded read(const uint16_t* w) { return {(__m512bh)_mm512_loadu_si512(w)}; }
  static floats add(floats sum, Loaded w, const uint16_t* x) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, w.all, (__m512bh)_mm512_loadu_si512(x));
  }
};
#else
struct Bfloat16 {
  using Weight = uint16_t;
  using Input = float;
  static constexpr int kChunk = 2 * kLanes;
  struct Loaded {
    floats even, odd;
  };
  static Loaded read(const uint16_t* w) {
    words bits = *(const words*)w;
    return {(floats)(bits << 16), (floats)(bits & 0xffff0000u)};
  }
  // Even, then odd elements of a chunk.
  static void split(const uint16_t* x, float* to) {
    Loaded both = read(x);
    *(floats*)to = both.even;
    *(floats*)(to + kLanes) = both.odd;
  }
  static void prepare(const uint16_t* x, int64_t in, float* to) {
    const int64_t whole = in / kChunk * kChunk;
    for (int64_t at = 0; at < whole; at += kChunk) split(x + at, to + at);
    if (whole < in) {
      uint16_t rest[kChunk] = {};
      std::memcpy(rest, x + whole, 2 * (in - whole));
      split(rest, to + whole);
    }
  }
  static floats add(floats sum, Loaded w, const float* x) {
    sum += w.even * *(const floats*)x;
    return sum + w.odd * *(const floats*)(x + kLanes);
  }
};
#endif

inline four sums_of(const floats* v) {  // the four sums over the floats of v[0..3]
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

template <class T>
inline void put_some(T* to, const T* from, int count) {
  for (int i = 0; i < count; ++i) to[i] = from[i];
}

inline void put(float* to, four value, int count) {
  if (count == 4)
    *(four*)to = value;
  else
    put_some(to, (const float*)&value, count);
}

inline void put(uint16_t* to, four value, int count) {  // to the nearest, ties to even
  typedef uint32_t four_words __attribute__((vector_size(16)));
  typedef uint16_t four_halves __attribute__((vector_size(8), may_alias));
  four_words bits = (four_words)value;
  four_words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  four_words fine = (four_words)(value == value);
  four_halves halves = __builtin_convertvector((rounded & fine) | (0x7fc0u & ~fine), four_halves);
  if (count == 4) {
    std::memcpy(to, &halves, 8);
  } else if (count == 3) {
    std::memcpy(to, &halves, 4);
    to[2] = halves[2];
  } else {
    put_some(to, (const uint16_t*)&halves, count);
  }
}

inline four get(const float* from, int count) {
  four value{};
  for (int i = 0; i < count; ++i) value[i] = from[i];
  return value;
}
inline four get(const uint16_t* from, int count) {
  four value{};
  for (int i = 0; i < count; ++i) {
    uint32_t bits = uint32_t(from[i]) << 16;
    float one;
    std::memcpy(&one, &bits, 4);
    value[i] = one;
  }
  return value;
}

// R rows and N outputs, all sums in registers. `fresh`: these weights are read for the first time;
// what follows them is then fetched ahead, since the processor's own prefetching stops at every
// page (measured on Ice Lake: 0.7 of the time at 1 row, 0.6 at 4). From 4 rows on it goes to the
// second cache, since the first has too few lines under way. Never inlined: several in one function
// take 1.8 times as long for 4 rows, GCC 12 then runs out of registers.
template <class Kind, int R, int N, bool fresh>
__attribute__((noinline)) void tile(const typename Kind::Input* x, int64_t x_stride,
                                    const typename Kind::Weight* const* w, int64_t in, four* out) {
  floats sums[R][4] = {};
  const int64_t whole = in / Kind::kChunk * Kind::kChunk;
  for (int64_t at = 0; at < whole; at += Kind::kChunk) {
    typename Kind::Loaded loaded[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      loaded[n] = Kind::read(w[n] + at);
      if (fresh) __builtin_prefetch((const char*)(w[n] + at) + kAhead, 0, R < 4 ? 3 : 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        sums[r][n] = Kind::add(sums[r][n], loaded[n], x + r * x_stride + at);
  }
  if (whole < in) {
    typename Kind::Weight rest[N][Kind::kChunk] = {};
    for (int n = 0; n < N; ++n)
      std::memcpy(rest[n], w[n] + whole, (in - whole) * sizeof(rest[0][0]));
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        sums[r][n] = Kind::add(sums[r][n], Kind::read(rest[n]), x + r * x_stride + whole);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) out[r] = sums_of(sums[r]);
}

template <class Kind, int N, bool fresh>
inline void tiles(const typename Kind::Input* x, int64_t stride,
                  const typename Kind::Weight* const* w, int64_t in, int64_t rows, four* out) {
  switch (rows) {
    case 1: tile<Kind, 1, N, fresh>(x, stride, w, in, out); break;
    case 2: tile<Kind, 2, N, fresh>(x, stride, w, in, out); break;
    case 3: tile<Kind, 3, N, fresh>(x, stride, w, in, out); break;
#if defined(__AVX512F__)
    case 4: tile<Kind, 4, N, fresh>(x, stride, w, in, out); break;
    case 5: tile<Kind, 5, N, fresh>(x, stride, w, in, out); break;
    case 6: tile<Kind, 6, N, fresh>(x, stride, w, in, out); break;
    case 7: tile<Kind, 7, 3, fresh>(x, stride, w, in, out); break;
    case 8: tile<Kind, 8, 3, fresh>(x, stride, w, in, out); break;
#endif
  }
}

// Outputs begin..end of some rows, N at a time.
template <class Kind, int N, bool fresh>
inline void strip(const typename Kind::Input* x, int64_t stride, const typename Kind::Weight* w,
                  int64_t in, const typename Kind::Weight* bias, typename Kind::Weight* y,
                  int64_t y_stride, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += N) {
    const int wide = int(std::min<int64_t>(N, end - n));
    const typename Kind::Weight* row[N];
    for (int i = 0; i < N; ++i) row[i] = w + (n + std::min(i, wide - 1)) * in;
    four out[kMany];
    tiles<Kind, N, fresh>(x, stride, row, in, rows, out);
    const four added = bias ? get(bias + n, wide) : four{};
    for (int64_t r = 0; r < rows; ++r)
      put(y + r * y_stride + n, bias ? out[r] + added : out[r], wide);
  }
}

// Outputs begin..end of all rows of a panel. The activations of some rows stay in the first cache
// while the weights pass by, which come from the second cache for all rows but the first.
template <class Kind>
void outputs(const typename Kind::Input* x, int64_t stride, const typename Kind::Weight* w,
             int64_t in, const typename Kind::Weight* bias, typename Kind::Weight* y,
             int64_t y_stride, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t r = 0, here; r < rows; r += here) {
    const int64_t left = rows - r;
    const bool last = left > kFew && left <= kMany;  // one pass instead of two
    here = last ? left : std::min<int64_t>(kFew, left);
    const auto run = last ? (r ? strip<Kind, kOuts - 1, false> : strip<Kind, kOuts - 1, true>)
                          : (r ? strip<Kind, kOuts, false> : strip<Kind, kOuts, true>);
    run(x + r * stride, stride, w, in, bias, y + r * y_stride, y_stride, here, begin, end);
  }
}

// The next line of the cache: a load that lies across two of them costs two.
template <class T>
inline T* aligned(T* p) {
  return (T*)((uintptr_t(p) + 63) / 64 * 64);
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
    for (int64_t r = 0; r < count; ++r) {
      if (stride > in) std::fill(prepared + r * stride + in, prepared + (r + 1) * stride, Input(0));
      Kind::prepare(x + (first + r) * x_stride, in, prepared + r * stride);
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

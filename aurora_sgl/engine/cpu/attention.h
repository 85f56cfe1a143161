// Paged attention: all requests and heads of a layer, keys and values read where they lie.
#pragma once

#include "numbers.h"

namespace {

constexpr int kKeys = 64;  // keys of one block
constexpr int kQueries = 32;  // query tokens of one block

typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));  // 16 floats

// c[R, 16 * N] = (c +) a[R, depth] @ b[depth, 16 * N], all sums in registers.
template <int R, int N>
inline void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                 int64_t c_stride, int64_t depth, bool add) {
  lanes sums[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      sums[r][n] = add ? *(const lanes*)(c + r * c_stride + 16 * n) : lanes{};
  for (int64_t d = 0; d < depth; ++d) {
    lanes row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = *(const lanes*)(b + d * b_stride + 16 * n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float one = a[r * a_stride + d];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[r][n] += one * row[n];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) *(lanes*)(c + r * c_stride + 16 * n) = sums[r][n];
}

template <int N>
void columns(const float* a, int64_t rows, int64_t a_stride, const float* b, int64_t b_stride,
             float* c, int64_t c_stride, int64_t depth, bool add) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    tile<4, N>(a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride, depth, add);
  const float* left = a + r * a_stride;
  float* into = c + r * c_stride;
  switch (rows - r) {
    case 3: tile<3, N>(left, a_stride, b, b_stride, into, c_stride, depth, add); break;
    case 2: tile<2, N>(left, a_stride, b, b_stride, into, c_stride, depth, add); break;
    case 1: tile<1, N>(left, a_stride, b, b_stride, into, c_stride, depth, add); break;
  }
}

// c[rows, width] = (c +) a[rows, depth] @ b[depth, width]; width is a multiple of 16.
void product(const float* a, int64_t rows, int64_t a_stride, const float* b, int64_t b_stride,
             float* c, int64_t c_stride, int64_t depth, int64_t width, bool add) {
  int64_t at = 0;
  for (; at + 64 <= width; at += 64)
    columns<4>(a, rows, a_stride, b + at, b_stride, c + at, c_stride, depth, add);
  switch ((width - at) / 16) {
    case 3: columns<3>(a, rows, a_stride, b + at, b_stride, c + at, c_stride, depth, add); break;
    case 2: columns<2>(a, rows, a_stride, b + at, b_stride, c + at, c_stride, depth, add); break;
    case 1: columns<1>(a, rows, a_stride, b + at, b_stride, c + at, c_stride, depth, add); break;
  }
}

// out[16 columns of in][16] = in[16 rows][16] transposed.
inline void transpose16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; ++i) {
    __m512 p = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    __m512 q = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    __m512 r = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    __m512 s = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    _mm512_storeu_ps(out + (i)*out_stride, _mm512_shuffle_f32x4(p, q, 0x88));
    _mm512_storeu_ps(out + (i + 4) * out_stride, _mm512_shuffle_f32x4(r, s, 0x88));
    _mm512_storeu_ps(out + (i + 8) * out_stride, _mm512_shuffle_f32x4(p, q, 0xdd));
    _mm512_storeu_ps(out + (i + 12) * out_stride, _mm512_shuffle_f32x4(r, s, 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}

struct Plan {  // the same for all layers of a forward; native.py has its twin
  const int32_t* table;  // [.., table_stride] cache slots of each row's tokens
  const int64_t* rows;  // [batch] row of the table
  const int64_t* lengths;  // [batch] tokens, with the new ones
  const int64_t* news;  // [batch] new tokens; null: one each
  const int64_t* starts;  // [batch] first query row; null: request number
  const uint8_t* tree;  // [batch, new, new] node i sees node j; null: causal or all
  int64_t table_stride, batch, longest_new, total, window;
  int32_t causal;
};

struct Shape {
  int64_t heads, kv_heads, dim, value_dim, q_stride, o_stride;
  float scale, cap;
};

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

struct Scratch {
  std::vector<float> memory;
  float *query, *keys, *turned, *values, *logits, *sums, *most, *mass;
  void fit(int64_t rows, int64_t dim, int64_t value_dim) {
    int64_t sizes[] = {rows * dim,    kKeys * dim,      kKeys * dim, kKeys * value_dim,
                       rows * kKeys,  rows * value_dim, rows,        rows};
    float** parts[] = {&query, &keys, &turned, &values, &logits, &sums, &most, &mass};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    if (int64_t(memory.size()) < total) memory.resize(total);
    float* at = memory.data();
    for (int i = 0; i < 8; ++i) {
      *parts[i] = at;
      at += sizes[i];
    }
  }
};

// Softmax of one block's logits on top of what came before; returns nothing visible as zeros.
inline void fold(float* logits, float* sums, float* most, float* mass, int64_t value_dim) {
  float top = *most;
#pragma omp simd reduction(max : top)
  for (int i = 0; i < kKeys; ++i) top = std::max(top, logits[i]);
  if (top == -std::numeric_limits<float>::infinity()) {
    std::fill(logits, logits + kKeys, 0.0f);
    return;
  }
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < kKeys; ++i) {
    logits[i] = exp_(logits[i] - top);
    total += logits[i];
  }
  float shrink = exp_(*most - top);
  *mass = *mass * shrink + total;
  if (shrink != 1.0f) {
#pragma omp simd
    for (int64_t i = 0; i < value_dim; ++i) sums[i] *= shrink;
  }
  *most = top;
}

// One block of query tokens of one request against one key head.
template <class T>
void attend(const Plan& plan, const Shape& shape, const T* q, T* o, const T* k_buffer,
            const T* v_buffer, int64_t request, int64_t kv_head, int64_t first) {
  const int64_t fresh = plan.news ? plan.news[request] : 1;
  const int64_t tokens = std::min<int64_t>(kQueries, fresh - first);
  if (tokens <= 0) return;
  const int64_t groups = shape.heads / shape.kv_heads, count = tokens * groups;
  const int64_t length = plan.lengths[request], old = length - fresh;
  const int64_t start = (plan.starts ? plan.starts[request] : request) + first;
  const int64_t dim = padded(shape.dim), value_dim = padded(shape.value_dim);
  const int32_t* slots = plan.table + plan.rows[request] * plan.table_stride;
  const float never = -std::numeric_limits<float>::infinity();
  thread_local Scratch own;
  Scratch& at = own;
  at.fit(count, dim, value_dim);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < groups; ++g) {
      const T* from = q + (start + t) * shape.q_stride + (kv_head * groups + g) * shape.dim;
      float* to = at.query + (t * groups + g) * dim;
      for (int64_t i = 0; i < shape.dim; ++i) to[i] = load(from + i) * shape.scale;
    }
  std::fill(at.sums, at.sums + count * value_dim, 0.0f);
  std::fill(at.most, at.most + count, never);
  std::fill(at.mass, at.mass + count, 0.0f);
  // Without a tree the last of these tokens sees furthest.
  const int64_t end = (plan.tree || !plan.causal) ? length : old + first + tokens;
  int64_t begin = plan.window > 0 ? std::max<int64_t>(0, old + first - plan.window + 1) : 0;
  begin = begin / kKeys * kKeys;
  if (dim != shape.dim) std::fill(at.keys, at.keys + kKeys * dim, 0.0f);
  if (value_dim != shape.value_dim) std::fill(at.values, at.values + kKeys * value_dim, 0.0f);
  for (int64_t block = begin; block < end; block += kKeys) {
    const int64_t here = std::min<int64_t>(kKeys, end - block);
    const int64_t keys16 = padded(here);
    for (int64_t j = 0; j < here; ++j) {
      const int64_t slot = slots[block + j] * shape.kv_heads + kv_head;
      const T* key = k_buffer + slot * shape.dim;
      const T* value = v_buffer + slot * shape.value_dim;
      float* key_to = at.keys + j * dim;
      float* value_to = at.values + j * value_dim;
#pragma omp simd
      for (int64_t i = 0; i < shape.dim; ++i) key_to[i] = load(key + i);
#pragma omp simd
      for (int64_t i = 0; i < shape.value_dim; ++i) value_to[i] = load(value + i);
    }
    std::fill(at.keys + here * dim, at.keys + keys16 * dim, 0.0f);
    for (int64_t j = 0; j < keys16; j += 16)
      for (int64_t i = 0; i < dim; i += 16)
        transpose16(at.keys + j * dim + i, dim, at.turned + i * kKeys + j, kKeys);
    product(at.query, count, dim, at.turned, kKeys, at.logits, kKeys, shape.dim, keys16, false);
    if (shape.cap > 0.0f)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < here; ++j) {
          float& logit = at.logits[i * kKeys + j];
          logit = shape.cap * std::tanh(logit / shape.cap);
        }
    const bool all_seen = here == kKeys && block + here <= old && plan.window <= 0;
    for (int64_t i = 0; i < count; ++i) {
      float* logits = at.logits + i * kKeys;
      if (!all_seen) {
        const int64_t own_place = first + i / groups, position = old + own_place;
        const uint8_t* seen =
            plan.tree ? plan.tree + (request * fresh + own_place) * fresh : nullptr;
        for (int64_t j = 0; j < kKeys; ++j) {
          const int64_t key = block + j;
          bool visible = j < here && (plan.window <= 0 || key > position - plan.window);
          if (visible && key >= old)
            visible = seen ? seen[key - old] != 0 : (!plan.causal || key <= position);
          if (!visible) logits[j] = never;
        }
      }
      fold(logits, at.sums + i * value_dim, at.most + i, at.mass + i, value_dim);
    }
    product(at.logits, count, kKeys, at.values, value_dim, at.sums, value_dim, here, value_dim,
            true);
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t i = t * groups + g;
      T* to = o + (start + t) * shape.o_stride + (kv_head * groups + g) * shape.value_dim;
      const float scale = 1.0f / at.mass[i];
      const float* from = at.sums + i * value_dim;
      for (int64_t d = 0; d < shape.value_dim; ++d) store(to + d, from[d] * scale);
    }
}

template <class T>
void attention_(const Plan& plan, const Shape& shape, const T* q, T* o, const T* k_buffer,
                const T* v_buffer) {
  const int64_t blocks = (plan.longest_new + kQueries - 1) / kQueries;
  const int64_t items = plan.batch * shape.kv_heads * blocks;
  // About 60 microseconds of one thread: less is not worth waking another.
  const bool share = double(plan.total) * plan.longest_new * shape.heads * shape.dim > 1.5e6;
#pragma omp parallel for schedule(dynamic) if (share && items > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t request = item / (shape.kv_heads * blocks);
    attend(plan, shape, q, o, k_buffer, v_buffer, request, item / blocks % shape.kv_heads,
           item % blocks * kQueries);
  }
}

}  // namespace

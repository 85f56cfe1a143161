// One decoder layer of the Llama family in one call: what lies between two additions to the
// residual stream, from the first norm to the last projection.
#pragma once

#include "attention.h"
#include "linear.h"
#include "small.h"

namespace {

struct Layer {  // the same for every call; native.py has its twin
  const void *norm, *second_norm;  // a drafter's second norm is that of the hidden states
  const void *qkv, *qkv_bias, *o, *o_bias, *post_norm, *gate_up, *gate_up_bias, *down, *down_bias;
  const void* angles;  // [positions, rotary_dim] cosines, then sines
  void *keys, *values;  // [slots, kv_heads, dim] the cache of this layer
  int64_t hidden, inner, heads, kv_heads, dim, rotary_dim, positions;
  float eps, second_eps, post_eps, scale, cap;
  int32_t kind, angles_kind, neox;
};

struct Rows {  // of one call
  const int64_t *positions, *slots;  // [count] place in the sequence and in the cache
  int64_t count;
};

template <class T, class C>
void layer_(const Layer& layer, const Plan& plan, const Rows& rows, T* x, T* residual, T* out,
            const T* embedded) {
  const int64_t n = rows.count, hidden = layer.hidden, dim = layer.dim;
  const int64_t q_width = layer.heads * dim, kv_width = layer.kv_heads * dim;
  const int64_t in = embedded ? 2 * hidden : hidden, qkv_width = q_width + 2 * kv_width;
  thread_local std::vector<T> memory;
  const int64_t sizes[] = {in, qkv_width, q_width, hidden, 2 * layer.inner, layer.inner};
  int64_t total = 0;
  for (int64_t size : sizes) total += n * size;
  if (int64_t(memory.size()) < total) memory.resize(total);
  T* parts[6];
  T* at = memory.data();
  for (int i = 0; i < 6; ++i) {
    parts[i] = at;
    at += n * sizes[i];
  }
  auto [normed, qkv, attended, projected, gate_up, active] = parts;

  if (embedded) {
    rmsnorm_(embedded, (T*)nullptr, (const T*)layer.norm, normed, n, hidden, hidden, 0, in,
             layer.eps);
    rmsnorm_((const T*)x, (T*)nullptr, (const T*)layer.second_norm, normed + hidden, n, hidden,
             hidden, 0, in, layer.second_eps);
  } else {
    rmsnorm_((const T*)x, residual == x ? nullptr : residual, (const T*)layer.norm, normed, n,
             hidden, hidden, hidden, in, layer.eps);
  }
  linear(layer.kind, normed, in, layer.qkv, layer.qkv_bias, qkv, qkv_width, n, in, qkv_width);
  rotary_(qkv, qkv + q_width, (const C*)layer.angles, layer.positions, rows.positions, n,
          layer.heads, layer.kv_heads, dim, layer.rotary_dim, qkv_width, qkv_width,
          layer.neox != 0);
  for (int64_t r = 0; r < n; ++r) {
    const T* from = qkv + r * qkv_width + q_width;
    std::memcpy((T*)layer.keys + rows.slots[r] * kv_width, from, kv_width * sizeof(T));
    std::memcpy((T*)layer.values + rows.slots[r] * kv_width, from + kv_width,
                kv_width * sizeof(T));
  }
  const Shape shape{layer.heads, layer.kv_heads, dim, dim, qkv_width, q_width, layer.scale,
                    layer.cap};
  attention_(plan, shape, (const T*)qkv, attended, (const T*)layer.keys, (const T*)layer.values);
  linear(layer.kind, attended, q_width, layer.o, layer.o_bias, projected, hidden, n, q_width,
         hidden);
  rmsnorm_((const T*)projected, residual, (const T*)layer.post_norm, normed, n, hidden, hidden,
           hidden, hidden, layer.post_eps);
  linear(layer.kind, normed, hidden, layer.gate_up, layer.gate_up_bias, gate_up, 2 * layer.inner,
         n, hidden, 2 * layer.inner);
  silu_and_mul_((const T*)gate_up, active, n, layer.inner, 2 * layer.inner);
  linear(layer.kind, active, layer.inner, layer.down, layer.down_bias, out, hidden, n,
         layer.inner, hidden);
}

}  // namespace

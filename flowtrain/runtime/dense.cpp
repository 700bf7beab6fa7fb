// Fully connected networks of rectified units, and their gradients. A block of rows goes through all layers, so that its
// activations stay in the processor's first caches.
//
// Layer l computes zₗ = Wₗ·aₗ + bₗ, or zₗ₋₂ + Wₗ·aₗ + bₗ if it ends a residual block, where aₗ is zₗ₋₁ or its rectified
// numbers, and z₋₁ = x. A row of each is padded with zeros to a multiple of WIDTH numbers.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parts.h"

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, TILE = 8;
#elif defined(__AVX__)
constexpr int BYTES = 32, TILE = 4;
#else
constexpr int BYTES = 16, TILE = 4;
#endif
constexpr int64_t ROWS = 64, WIDTH = 16;

struct Layer {
  int64_t in, out, rectifies, skips;
  const void *weight, *bias;        // (out, in) and (out)
  void *grad_weight, *grad_bias;
};

inline int64_t padded(int64_t size) { return (size + WIDTH - 1) / WIDTH * WIDTH; }

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
  static constexpr int SIZE = BYTES / sizeof(T);
  static inline type load(const T* from) {
    type result;
    std::memcpy(&result, from, BYTES);
    return result;
  }
};

// TILE rows and COUNT vectors of columns of c += a·b, where a (row, i) lies at a[row·row_a + i·column_a].
template <typename T, int COUNT>
inline void tile(const T* a, int64_t row_a, int64_t column_a, const T* b, int64_t row_b, T* c, int64_t row_c,
                 int64_t depth) {
  using V = Vector<T>;
  typename V::type sum[TILE][COUNT] = {};
  for (int64_t i = 0; i < depth; ++i) {
    typename V::type of_b[COUNT];
    for (int v = 0; v < COUNT; ++v) of_b[v] = V::load(b + i * row_b + v * V::SIZE);
    for (int r = 0; r < TILE; ++r) {
      T of_a = a[r * row_a + i * column_a];
      for (int v = 0; v < COUNT; ++v) sum[r][v] += of_a * of_b[v];
    }
  }
  for (int r = 0; r < TILE; ++r)
    for (int v = 0; v < COUNT; ++v) {
      T* to = c + r * row_c + v * V::SIZE;
      sum[r][v] += V::load(to);
      std::memcpy(to, &sum[r][v], BYTES);
    }
}

// c += a·b of ``rows`` rows, a multiple of TILE, and ``columns`` columns, a multiple of WIDTH.
template <typename T>
void add_product(const T* a, int64_t row_a, int64_t column_a, const T* b, int64_t row_b, T* c, int64_t row_c,
                 int64_t rows, int64_t columns, int64_t depth) {
  constexpr int SIZE = Vector<T>::SIZE;
  int64_t j = 0;
  for (; j + 2 * SIZE <= columns; j += 2 * SIZE)
    for (int64_t r = 0; r < rows; r += TILE)
      tile<T, 2>(a + r * row_a, row_a, column_a, b + j, row_b, c + r * row_c + j, row_c, depth);
  for (; j < columns; j += SIZE)
    for (int64_t r = 0; r < rows; r += TILE)
      tile<T, 1>(a + r * row_a, row_a, column_a, b + j, row_b, c + r * row_c + j, row_c, depth);
}

// A block's rows of numbers (rows, size), padded; rows beyond the last are 0.
template <typename T>
void read_rows(const T* from, int64_t rows, int64_t size, T* to) {
  int64_t width = padded(size);
  for (int64_t r = 0; r < ROWS; ++r) {
    int64_t here = r < rows ? size : 0;
    std::copy(from + r * size, from + r * size + here, to + r * width);
    std::fill(to + r * width + here, to + (r + 1) * width, T(0));
  }
}

// Memory of a thread, which its next call uses again, in pieces that begin where a vector may.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    static thread_local std::vector<T> memory;
    if (int64_t(memory.size()) < size + WIDTH) memory.resize(size + WIDTH);
    auto place = reinterpret_cast<uintptr_t>(memory.data());
    next_ = reinterpret_cast<T*>((place + BYTES - 1) / BYTES * BYTES);
  }

  T* take(int64_t size) {  // a multiple of WIDTH
    next_ += size;
    return next_ - size;
  }

 private:
  T* next_;
};

// Where z of each layer but the last begins in the activations of a block, and their number.
std::vector<int64_t> offsets_of(const Layer* layers, int64_t count) {
  std::vector<int64_t> found(1, 0);
  for (int64_t l = 0; l + 1 < count; ++l) found.push_back(found.back() + ROWS * padded(layers[l].out));
  return found;
}

int64_t widest_of(const Layer* layers, int64_t count) {
  int64_t widest = padded(layers[0].in);
  for (int64_t l = 0; l < count; ++l) widest = std::max(widest, padded(layers[l].out));
  return widest;
}

// Where each layer's weights and bias begin, in so many padded numbers as the last one says.
std::vector<int64_t> starts_of(const Layer* layers, int64_t count, bool pads_inputs) {
  std::vector<int64_t> found(1, 0);
  for (int64_t l = 0; l < count; ++l)
    found.push_back(found.back() + ((pads_inputs ? padded(layers[l].in) : layers[l].in) + 1) * padded(layers[l].out));
  return found;
}

// a of a layer, given z of the layer before: in ``scratch`` where the layer rectifies it.
template <typename T>
const T* input_of(const Layer& layer, const T* z, T* scratch) {
  if (!layer.rectifies) return z;
  int64_t size = ROWS * padded(layer.in);
  for (int64_t i = 0; i < size; ++i) scratch[i] = z[i] < 0 ? T(0) : z[i];
  return scratch;
}

template <typename T>
void forward(const T* x, T* y, T* kept, int64_t first, int64_t last, int64_t rows, const Layer* layers, int64_t count) {
  auto offsets = offsets_of(layers, count), starts = starts_of(layers, count, false);
  int64_t widest = widest_of(layers, count), total = offsets.back();
  Scratch<T> memory(starts.back() + 3 * ROWS * widest + (kept ? 0 : total));
  T* transposed = memory.take(starts.back());
  for (int64_t l = 0; l < count; ++l) {  // (in, out) and then the bias
    const Layer& layer = layers[l];
    int64_t width = padded(layer.out);
    const T *weight = static_cast<const T*>(layer.weight), *bias = static_cast<const T*>(layer.bias);
    T* to = transposed + starts[l];
    if (layer.out < width) std::fill(to, transposed + starts[l + 1], T(0));
    for (int64_t left = 0; left < layer.in; left += WIDTH)  // a few columns at a time, whose places stay in the cache
      for (int64_t o = 0; o < layer.out; ++o)
        for (int64_t i = left; i < std::min(left + WIDTH, layer.in); ++i) to[i * width + o] = weight[o * layer.in + i];
    std::copy(bias, bias + layer.out, to + layer.in * width);
  }
  T *of_x = memory.take(ROWS * widest), *rectified = memory.take(ROWS * widest), *of_y = memory.take(ROWS * widest);
  T* own = kept ? nullptr : memory.take(total);
  for (int64_t block = first; block < last; ++block) {
    int64_t here = std::min(ROWS, rows - block * ROWS);
    read_rows(x + block * ROWS * layers[0].in, here, layers[0].in, of_x);
    T* activations = kept ? kept + block * total : own;
    auto z_of = [&](int64_t l) { return l < 0 ? of_x : l + 1 < count ? activations + offsets[l] : of_y; };
    for (int64_t l = 0; l < count; ++l) {
      const Layer& layer = layers[l];
      int64_t width = padded(layer.out);
      const T *weight = transposed + starts[l], *bias = weight + layer.in * width;
      const T* before = layer.skips ? z_of(l - 2) : nullptr;
      T* z = z_of(l);
      for (int64_t r = 0; r < ROWS; ++r)
        for (int64_t o = 0; o < width; ++o) z[r * width + o] = bias[o] + (before ? before[r * width + o] : T(0));
      const T* a = input_of(layer, z_of(l - 1), rectified);
      add_product(a, padded(layer.in), int64_t(1), weight, width, z, width, ROWS, width, layer.in);
    }
    int64_t size = layers[count - 1].out, width = padded(size);
    for (int64_t r = 0; r < here; ++r)
      std::memcpy(y + (block * ROWS + r) * size, of_y + r * width, size * sizeof(T));
  }
}

template <typename T>
void backward(const T* x, const T* grad_y, T* grad_x, const T* kept, int64_t first, int64_t last, int64_t rows,
              const Layer* layers, int64_t count) {
  auto offsets = offsets_of(layers, count), starts = starts_of(layers, count, true);
  int64_t widest = widest_of(layers, count), total = offsets.back();
  Scratch<T> memory(2 * starts.back() + 5 * ROWS * widest);
  T *weights = memory.take(starts.back()), *grads = memory.take(starts.back());
  std::fill(grads, grads + starts.back(), T(0));
  for (int64_t l = 0; l < count; ++l) {  // (out, in), and room for the bias
    const Layer& layer = layers[l];
    int64_t in = padded(layer.in);
    const T* weight = static_cast<const T*>(layer.weight);
    for (int64_t o = 0; o < layer.out; ++o) {
      T* to = weights + starts[l] + o * in;
      std::fill(std::copy(weight + o * layer.in, weight + (o + 1) * layer.in, to), to + in, T(0));
    }
  }
  T *of_x = memory.take(ROWS * widest), *rectified = memory.take(ROWS * widest);
  // gradients of the outputs of three layers in succession: of the layer in turn, and of those above and below it
  T *above = memory.take(ROWS * widest), *here = memory.take(ROWS * widest), *below = memory.take(ROWS * widest);
  for (int64_t block = first; block < last; ++block) {
    int64_t in_block = std::min(ROWS, rows - block * ROWS);
    read_rows(x + block * ROWS * layers[0].in, in_block, layers[0].in, of_x);
    read_rows(grad_y + block * ROWS * layers[count - 1].out, in_block, layers[count - 1].out, here);
    for (int64_t l = count - 1; l >= 0; --l) {
      const Layer& layer = layers[l];
      int64_t in = padded(layer.in), out = padded(layer.out);
      const T* z = l ? kept + block * total + offsets[l - 1] : of_x;
      T *grad_weight = grads + starts[l], *grad_bias = grad_weight + in * out;
      add_product(here, int64_t(1), out, input_of(layer, z, rectified), in, grad_weight, in, out, in, ROWS);
      for (int64_t r = 0; r < ROWS; ++r)
        for (int64_t o = 0; o < out; ++o) grad_bias[o] += here[r * out + o];
      std::memset(below, 0, ROWS * in * sizeof(T));
      add_product(here, out, int64_t(1), weights + starts[l], in, below, in, ROWS, in, layer.out);
      if (layer.rectifies)
        for (int64_t i = 0; i < ROWS * in; ++i) below[i] = z[i] <= 0 ? T(0) : below[i];
      if (l + 1 < count && layers[l + 1].skips)
        for (int64_t i = 0; i < ROWS * in; ++i) below[i] += above[i];
      std::swap(above, below);
      std::swap(above, here);
    }
    for (int64_t r = 0; r < in_block; ++r)
      std::memcpy(grad_x + (block * ROWS + r) * layers[0].in, here + r * padded(layers[0].in), layers[0].in * sizeof(T));
  }
  for (int64_t l = 0; l < count; ++l) {
    const Layer& layer = layers[l];
    const T* from = grads + starts[l];
    int64_t in = padded(layer.in);
    T* to = static_cast<T*>(layer.grad_weight);
    for (int64_t o = 0; o < layer.out; ++o) std::copy(from + o * in, from + o * in + layer.in, to + o * layer.in);
    from += in * padded(layer.out);
    std::copy(from, from + layer.out, static_cast<T*>(layer.grad_bias));
  }
}

}  // namespace

// Each part of the blocks adds up its own gradients of the weights: ``layers`` holds those of one part after those of
// another.
#define EXPORT(NAME, T)                                                                                               \
  extern "C" void forward_##NAME(const T* x, T* y, T* kept, int64_t rows, int64_t parts, const Layer* layers,         \
                                 int64_t count) {                                                                     \
    in_parts((rows + ROWS - 1) / ROWS, parts, [=](int64_t, int64_t first, int64_t last) {                             \
      forward<T>(x, y, kept, first, last, rows, layers, count);                                                       \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" void backward_##NAME(const T* x, const T* grad_y, T* grad_x, const T* kept, int64_t rows, int64_t parts, \
                                  const Layer* layers, int64_t count) {                                               \
    in_parts((rows + ROWS - 1) / ROWS, parts, [=](int64_t part, int64_t first, int64_t last) {                        \
      backward<T>(x, grad_y, grad_x, kept, first, last, rows, layers + part * count, count);                          \
    });                                                                                                               \
  }

EXPORT(float32, float)
EXPORT(float64, double)

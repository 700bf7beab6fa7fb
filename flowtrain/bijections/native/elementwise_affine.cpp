// Affine maps y = (x + t)·exp(s) of some numbers of each vector, with t and s of each number: both directions, and their
// gradients. The other numbers stay as they are. The formulas, and their names, are those of univariate.py.
//
// Numbers are processed in blocks. Within a block every quantity is a row of WIDTH numbers, so that each inner loop
// becomes vector instructions.

#include <cstdint>
#include <cstring>

#include "elementary.h"
#include "parts.h"

namespace {

constexpr int WIDTH = 64;
enum Kind { EXPONENTIAL, SIGMOID, TANH };

// What s is as a function of the raw number u: u clamped to ±first; the logarithm of
// first + (1 − first)·second·sigmoid(u + third); or rescale·tanh(u).
struct Settings {
  double kind, first, second, third;
};

// Number i of n that are mapped is number places[i] of a row of D, or number i without places. Its t lies at
// θ[row·row_stride + i·element], and u after that by ``parameter``.
struct Layout {
  int64_t size, mapped;
  const int64_t* places;
  int64_t row, element, parameter;
};

// exp(s) and s, and the derivatives of s by u and by rescale.
template <class T>
struct Scale {
  T value[WIDTH], log[WIDTH], slope[WIDTH], by_rescale[WIDTH];

  void find(const Settings& settings, const T* u, const T* rescale) {
    const T first = T(settings.first), second = T(settings.second), third = T(settings.third);
    if (settings.kind == EXPONENTIAL) {
      for (int i = 0; i < WIDTH; i++) {
        log[i] = u[i] < -first ? -first : u[i] > first ? first : u[i];
        slope[i] = u[i] > -first && u[i] < first ? T(1) : T(0);
        value[i] = exp_of(log[i]);
      }
    } else if (settings.kind == SIGMOID) {
      for (int i = 0; i < WIDTH; i++) {
        T raw = u[i] + third, e = exp_of(raw < 0 ? raw : -raw), rest = 1 / (1 + e);
        T sigmoid = raw < 0 ? e * rest : rest;
        value[i] = first + (1 - first) * second * sigmoid;
        slope[i] = (1 - first) * second * e * rest * rest / value[i];
      }
      for (int i = 0; i < WIDTH; i++) log[i] = log_of(value[i]);
    } else {
      for (int i = 0; i < WIDTH; i++) {
        T tanh = tanh_of(u[i]);
        by_rescale[i] = tanh;
        log[i] = rescale[i] * tanh;
        slope[i] = rescale[i] * (1 - tanh * tanh);
        value[i] = exp_of(log[i]);
      }
    }
  }
};

// The numbers of a block that are mapped, from number ``first`` of all on: where they lie, and their parameters.
template <class T>
struct Block {
  int64_t row[WIDTH], at[WIDTH], of_theta[WIDTH], number[WIDTH];
  T x[WIDTH], t[WIDTH], u[WIDTH], rescale[WIDTH];

  void load(int64_t first, int count, const Layout& layout, const T* values, const T* theta, const T* of_rescale) {
    int64_t r = first / layout.mapped, i = first % layout.mapped;
    for (int k = 0; k < WIDTH; k++) {
      row[k] = r, number[k] = i;
      at[k] = r * layout.size + (layout.places ? layout.places[i] : i);
      of_theta[k] = r * layout.row + i * layout.element;
      x[k] = values[at[k]];
      t[k] = theta[of_theta[k]], u[k] = theta[of_theta[k] + layout.parameter];
      rescale[k] = of_rescale ? of_rescale[i] : T(1);
      if (k + 1 < count && ++i == layout.mapped) i = 0, r++;  // beyond the last number, the last one again
    }
  }
};

template <class T>
void forward(const T* x, const T* theta, const T* rescale, T* y, T* log_det, int64_t first, int64_t last,
             const Layout& layout, const Settings& settings, bool inverse) {
  if (layout.places) std::memcpy(y + first * layout.size, x + first * layout.size, (last - first) * layout.size * sizeof(T));
  for (int64_t r = first; r < last; r++) log_det[r] = 0;
  Block<T> block;
  Scale<T> scale;
  T found[WIDTH];
  const int64_t end = last * layout.mapped;
  for (int64_t k = first * layout.mapped; k < end; k += WIDTH) {
    const int count = end - k < WIDTH ? int(end - k) : WIDTH;
    block.load(k, count, layout, x, theta, rescale);
    scale.find(settings, block.u, block.rescale);
    for (int i = 0; i < WIDTH; i++)
      found[i] = inverse ? block.x[i] / scale.value[i] - block.t[i] : (block.x[i] + block.t[i]) * scale.value[i];
    for (int i = 0; i < count; i++) {
      y[block.at[i]] = found[i];
      log_det[block.row[i]] += inverse ? -scale.log[i] : scale.log[i];
    }
  }
}

template <class T>
void backward(const T* x, const T* theta, const T* rescale, const T* grad_y, const T* grad_log_det, T* grad_x,
              T* grad_theta, T* grad_rescale, int64_t first, int64_t last, const Layout& layout,
              const Settings& settings, bool inverse) {
  if (layout.places)
    std::memcpy(grad_x + first * layout.size, grad_y + first * layout.size, (last - first) * layout.size * sizeof(T));
  Block<T> block;
  Scale<T> scale;
  T of_x[WIDTH], of_t[WIDTH], of_u[WIDTH], of_y[WIDTH], of_log[WIDTH];
  const int64_t end = last * layout.mapped;
  for (int64_t k = first * layout.mapped; k < end; k += WIDTH) {
    const int count = end - k < WIDTH ? int(end - k) : WIDTH;
    block.load(k, count, layout, x, theta, rescale);
    scale.find(settings, block.u, block.rescale);
    for (int i = 0; i < WIDTH; i++) of_y[i] = grad_y[block.at[i]], of_log[i] = grad_log_det[block.row[i]];
    if (inverse) {
      for (int i = 0; i < WIDTH; i++) {
        of_x[i] = of_y[i] / scale.value[i];
        of_t[i] = -of_y[i];
        of_log[i] = -of_x[i] * block.x[i] - of_log[i];
      }
    } else {
      for (int i = 0; i < WIDTH; i++) {
        of_x[i] = of_t[i] = of_y[i] * scale.value[i];
        of_log[i] = of_x[i] * (block.x[i] + block.t[i]) + of_log[i];
      }
    }
    for (int i = 0; i < WIDTH; i++) of_u[i] = of_log[i] * scale.slope[i];
    for (int i = 0; i < count; i++) {
      grad_x[block.at[i]] = of_x[i];
      grad_theta[block.of_theta[i]] = of_t[i];
      grad_theta[block.of_theta[i] + layout.parameter] = of_u[i];
    }
    if (grad_rescale)
      for (int i = 0; i < count; i++) grad_rescale[block.number[i]] += of_log[i] * scale.by_rescale[i];
  }
}

}  // namespace

// ``grad_rescale`` has a row for each part of the rows.
#define EXPORT(NAME, T)                                                                                               \
  extern "C" void forward_##NAME(const T* x, const T* theta, const T* rescale, T* y, T* log_det, int64_t rows,        \
                                 int64_t parts, const Layout* layout, const Settings* settings, int inverse) {        \
    in_parts(rows, parts, [=](int64_t, int64_t first, int64_t last) {                                                 \
      forward<T>(x, theta, rescale, y, log_det, first, last, *layout, *settings, inverse);                            \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" void backward_##NAME(const T* x, const T* theta, const T* rescale, const T* grad_y, const T* grad_log_det, \
                                  T* grad_x, T* grad_theta, T* grad_rescale, int64_t rows, int64_t parts,             \
                                  const Layout* layout, const Settings* settings, int inverse) {                      \
    in_parts(rows, parts, [=](int64_t part, int64_t first, int64_t last) {                                            \
      T* to = grad_rescale ? grad_rescale + part * layout->mapped : nullptr;                                          \
      backward<T>(x, theta, rescale, grad_y, grad_log_det, grad_x, grad_theta, to, first, last, *layout, *settings,   \
                  inverse);                                                                                           \
    });                                                                                                               \
  }

EXPORT(float32, float)
EXPORT(float64, double)

// Affine maps of short vectors, one after the other, and their gradients, in float64 throughout.
//
// Rows are processed in blocks, with a block's numbers of one dimension side by side, so that inner loops become vector
// instructions.

#include <cmath>
#include <cstdint>
#include <vector>

#include "parts.h"

namespace {

constexpr int64_t ROWS = 16;

enum Kind { PERMUTE, SCALE, TRIANGULAR };

// PERMUTE: y[i] = x[order[i]]
// SCALE: y = (x + first)·exp(second)
// TRIANGULAR: y[i] = (L·U·x)[order[i]] where first, (D, D), holds L below its diagonal, U above and log|diag U| on it
template <class T>
struct Step {
  int64_t kind;
  const int64_t* order;
  const T *first, *second;  // second of TRIANGULAR: the signs of U's diagonal
  T *grad_first, *grad_second;
};

using Rows = std::vector<double>;  // (D, ROWS)

template <class T>
class Maps {
 public:
  Maps(const Step<T>* steps, int64_t count, int64_t size) : steps_(steps, steps + count), size_(size) {
    for (const auto& step : steps_) {
      scales_.emplace_back(size);
      for (int64_t i = 0; i < size; i++) {
        double& scale = scales_.back()[i];
        if (step.kind == SCALE) scale = std::exp(double(step.second[i])), log_det += step.second[i];
        if (step.kind == TRIANGULAR)
          scale = step.second[i] * std::exp(double(step.first[i * size + i])), log_det += step.first[i * size + i];
      }
    }
    inputs_.assign(count + 1, Rows(size * ROWS));
    middle_.assign(count, Rows(size * ROWS));
    work_.resize(size * ROWS);
  }

  double log_det = 0;

  void forward(const T* x, int64_t rows) {
    load(x, rows, inputs_[0]);
    for (size_t k = 0; k < steps_.size(); k++) apply(k);
  }

  void store(T* y, int64_t rows) const {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t d = 0; d < size_; d++) y[r * size_ + d] = T(inputs_.back()[d * ROWS + r]);
  }

  // Adds to the steps' gradients; rows beyond the last have none.
  void backward(const T* grad_y, double grad_log_det, T* grad_x, int64_t rows) {
    Rows grad(size_ * ROWS), next(size_ * ROWS);
    load(grad_y, rows, grad);
    for (size_t k = steps_.size(); k-- > 0;) {
      pull(k, grad, next, grad_log_det);
      grad.swap(next);
    }
    for (int64_t r = 0; r < rows; r++)
      for (int64_t d = 0; d < size_; d++) grad_x[r * size_ + d] = T(grad[d * ROWS + r]);
  }

 private:
  void load(const T* from, int64_t rows, Rows& to) const {
    for (int64_t r = 0; r < ROWS; r++)
      for (int64_t d = 0; d < size_; d++) to[d * ROWS + r] = r < rows ? double(from[r * size_ + d]) : 0.0;
  }

  static void copy(const double* from, double* to, double by = 1.0) {
    for (int64_t r = 0; r < ROWS; r++) to[r] = by * from[r];
  }

  static void add(double by, const double* from, double* to) {
    for (int64_t r = 0; r < ROWS; r++) to[r] += by * from[r];
  }

  static double dot(const double* a, const double* b) {
    double sum = 0;
    for (int64_t r = 0; r < ROWS; r++) sum += a[r] * b[r];
    return sum;
  }

  void apply(size_t k) {
    const Step<T>& step = steps_[k];
    const double *x = inputs_[k].data(), *scale = scales_[k].data();
    double *y = inputs_[k + 1].data(), *h = middle_[k].data(), *z = work_.data();
    if (step.kind == PERMUTE)
      for (int64_t i = 0; i < size_; i++) copy(x + step.order[i] * ROWS, y + i * ROWS);
    if (step.kind == SCALE)
      for (int64_t i = 0; i < size_; i++)
        for (int64_t r = 0; r < ROWS; r++) y[i * ROWS + r] = (x[i * ROWS + r] + step.first[i]) * scale[i];
    if (step.kind != TRIANGULAR) return;
    for (int64_t i = 0; i < size_; i++) {
      copy(x + i * ROWS, h + i * ROWS, scale[i]);
      for (int64_t j = i + 1; j < size_; j++) add(step.first[i * size_ + j], x + j * ROWS, h + i * ROWS);
    }
    for (int64_t i = 0; i < size_; i++) {
      copy(h + i * ROWS, z + i * ROWS);
      for (int64_t j = 0; j < i; j++) add(step.first[i * size_ + j], h + j * ROWS, z + i * ROWS);
    }
    for (int64_t i = 0; i < size_; i++) copy(z + step.order[i] * ROWS, y + i * ROWS);
  }

  void pull(size_t k, const Rows& grad, Rows& next, double grad_log_det) {
    const Step<T>& step = steps_[k];
    const double *x = inputs_[k].data(), *y = inputs_[k + 1].data(), *h = middle_[k].data(), *scale = scales_[k].data();
    const double* gy = grad.data();
    double *gx = next.data(), *gz = work_.data();
    if (step.kind == PERMUTE)
      for (int64_t i = 0; i < size_; i++) copy(gy + i * ROWS, gx + step.order[i] * ROWS);
    if (step.kind == SCALE)
      for (int64_t i = 0; i < size_; i++) {
        copy(gy + i * ROWS, gx + i * ROWS, scale[i]);
        double sum = 0;
        for (int64_t r = 0; r < ROWS; r++) sum += gx[i * ROWS + r];
        step.grad_first[i] += T(sum);
        step.grad_second[i] += T(dot(gy + i * ROWS, y + i * ROWS) + grad_log_det);
      }
    if (step.kind != TRIANGULAR) return;
    for (int64_t i = 0; i < size_; i++) copy(gy + i * ROWS, gz + step.order[i] * ROWS);
    Rows of_h(work_);
    double* gh = of_h.data();
    for (int64_t i = 0; i < size_; i++)
      for (int64_t j = 0; j < i; j++) {
        step.grad_first[i * size_ + j] += T(dot(gz + i * ROWS, h + j * ROWS));
        add(step.first[i * size_ + j], gz + i * ROWS, gh + j * ROWS);
      }
    for (int64_t j = 0; j < size_; j++) {
      copy(gh + j * ROWS, gx + j * ROWS, scale[j]);
      step.grad_first[j * size_ + j] += T(scale[j] * dot(gh + j * ROWS, x + j * ROWS) + grad_log_det);
      for (int64_t i = 0; i < j; i++) {
        step.grad_first[i * size_ + j] += T(dot(gh + i * ROWS, x + j * ROWS));
        add(step.first[i * size_ + j], gh + i * ROWS, gx + j * ROWS);
      }
    }
  }

  std::vector<Step<T>> steps_;
  int64_t size_;
  std::vector<std::vector<double>> scales_;  // exp of the logarithms in each step
  std::vector<Rows> inputs_, middle_;        // what enters each step, and its U·x
  Rows work_;
};

template <class T>
void forward(const T* x, T* y, T* log_det, int64_t first, int64_t last, int64_t size, const Step<T>* steps,
             int64_t count) {
  Maps<T> maps(steps, count, size);
  for (int64_t row = first; row < last; row += ROWS) {
    const int64_t rows = last - row < ROWS ? last - row : ROWS;
    maps.forward(x + row * size, rows);
    maps.store(y + row * size, rows);
    for (int64_t r = row; r < row + rows; r++) log_det[r] = T(maps.log_det);
  }
}

template <class T>
void backward(const T* x, const T* grad_y, const T* grad_log_det, T* grad_x, int64_t first, int64_t last, int64_t size,
              const Step<T>* steps, int64_t count) {
  Maps<T> maps(steps, count, size);
  for (int64_t row = first; row < last; row += ROWS) {
    const int64_t rows = last - row < ROWS ? last - row : ROWS;
    double sum = 0;
    for (int64_t r = row; r < row + rows; r++) sum += grad_log_det[r];
    maps.forward(x + row * size, rows);
    maps.backward(grad_y + row * size, sum, grad_x + row * size, rows);
  }
}

}  // namespace

// Each part of the rows adds up the gradients of the steps in its own places: ``steps`` holds those of one part after
// those of another.
#define EXPORT(NAME, T)                                                                                               \
  extern "C" void forward_##NAME(const T* x, T* y, T* log_det, int64_t rows, int64_t parts, int64_t size,             \
                                 const Step<T>* steps, int64_t count) {                                               \
    in_parts(rows, parts, [=](int64_t, int64_t first, int64_t last) {                                                 \
      forward<T>(x, y, log_det, first, last, size, steps, count);                                                     \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" void backward_##NAME(const T* x, const T* grad_y, const T* grad_log_det, T* grad_x, int64_t rows,        \
                                  int64_t parts, int64_t size, const Step<T>* steps, int64_t count) {                 \
    in_parts(rows, parts, [=](int64_t part, int64_t first, int64_t last) {                                            \
      backward<T>(x, grad_y, grad_log_det, grad_x, first, last, size, steps + part * count, count);                   \
    });                                                                                                               \
  }

EXPORT(float32, float)
EXPORT(float64, double)

// Work in parts, side by side in the threads that torch has; one after the other where the compiler has no OpenMP.

#pragma once

#include <cstdint>

template <class Compute>
void in_parts(int64_t count, int64_t parts, Compute compute) {
  if (parts == 1) return compute(0, int64_t(0), count);  // a parallel region of one thread would end the others
#pragma omp parallel for num_threads(int(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; part++) compute(part, count * part / parts, count * (part + 1) / parts);
}

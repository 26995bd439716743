// Actnorm folded into the invertible 1x1 convolution after it, on the CPU: the structs that describe a
// problem. The formulas are those of mflow_kernels/layers/folding.py.
//
//   fold           W = P L T S with T = U + diag(s) and S = diag(exp(log_scale)); or its inverse, by
//                  substitution
//   fold_backward  the gradients of L, U, log |s|, log_scale and bias
//
// All arithmetic is in float64, and each result is rounded once. Small matrices cost less here than the
// calls of torch's operators that the same arithmetic takes.
#pragma once

#include <cstdint>

namespace mflow {

constexpr int64_t kMostFolded = 64;  // with more channels BLAS is as fast

// The factors of one step, dense. Without an actnorm, log_scale and bias are null.
struct Factors {
    const void *permutation, *sign, *lower, *upper, *log_diagonal, *log_scale, *bias;
};

// The gradients of the parameters among them.
struct FactorGradients {
    void *lower, *upper, *log_diagonal, *log_scale, *bias;
};

enum class Invertible { yes, singular, infinite };

// Writes W (C, C) and its bias (C), dense, and adds log |det W| to log_det. If `inverse`, they are those of
// the inverse map; it is NaN unless it exists and is finite.
Invertible fold_cpu(const Factors& factors, int64_t channels, bool is_double, bool inverse, void* weight,
                    void* bias, double& log_det);

// `dweight` and `dbias` are the gradients of what `fold_cpu` wrote, dense.
void fold_backward_cpu(const Factors& factors, int64_t channels, bool is_double, bool inverse,
                       const void* dweight, const void* dbias, double dlog_det,
                       const FactorGradients& gradients);

}  // namespace mflow

// Folds actnorms into 1x1 convolutions on the CPU, one matrix after the other.

#include "fold.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/loops.h"

namespace mflow {
namespace {

// Square matrices of float64, row after row.
struct Square {
    int n;
    std::vector<double> values;
    explicit Square(int n) : n(n), values(size_t(n) * n) {}
    MFLOW_INLINE double* operator[](int row) { return values.data() + size_t(row) * n; }
    MFLOW_INLINE const double* operator[](int row) const { return values.data() + size_t(row) * n; }
};

MFLOW_INLINE void add_multiple(double factor, const double* from, double* to, int begin, int end) {
    for (int j = begin; j < end; ++j) to[j] += factor * from[j];
}

MFLOW_INLINE double dot(const double* a, const double* b, int begin, int end) {
    double sum = 0;
    for (int j = begin; j < end; ++j) sum += a[j] * b[j];
    return sum;
}

MFLOW_INLINE Square transposed(const Square& a) {
    Square t(a.n);
    for (int i = 0; i < a.n; ++i) {
        for (int j = 0; j < a.n; ++j) t[j][i] = a[i][j];
    }
    return t;
}

// a b, skipping the zeros of a: a is triangular or a permutation.
MFLOW_INLINE Square product(const Square& a, const Square& b) {
    Square y(a.n);
    for (int i = 0; i < a.n; ++i) {
        for (int k = 0; k < a.n; ++k) {
            if (a[i][k] != 0) add_multiple(a[i][k], b[k], y[i], 0, a.n);
        }
    }
    return y;
}

template <class A>
struct Fold {
    int n;
    Square permutation, lower, upper;  // lower has a diagonal of ones, and upper that of s
    std::vector<double> diagonal, scale, bias;
    double log_det = 0;

    MFLOW_INLINE Fold(const Factors& f, int n)
        : n(n), permutation(n), lower(n), upper(n), diagonal(n), scale(n, 1), bias(n) {
        const auto at = [](const void* data, int i) { return double(static_cast<const A*>(data)[i]); };
        for (int i = 0; i < n; ++i) {
            const double log_s = at(f.log_diagonal, i);
            diagonal[i] = at(f.sign, i) * std::exp(log_s);
            log_det += log_s;
            if (f.log_scale) {
                scale[i] = std::exp(at(f.log_scale, i));
                bias[i] = at(f.bias, i);
                log_det += at(f.log_scale, i);
            }
            for (int j = 0; j < n; ++j) {
                permutation[i][j] = at(f.permutation, i * n + j);
                lower[i][j] = j < i ? at(f.lower, i * n + j) : i == j;
                upper[i][j] = j > i ? at(f.upper, i * n + j) : i == j ? diagonal[i] : 0;
            }
        }
    }

    MFLOW_INLINE Square weight() const {
        Square w = product(permutation, product(lower, upper));
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < n; ++j) w[i][j] *= scale[j];
        }
        return w;
    }

    // S^-1 T^-1 L^-1 P^T, by substitution.
    MFLOW_INLINE Square inverse() const {
        Square y = transposed(permutation);
        for (int i = 0; i < n; ++i) {
            for (int k = 0; k < i; ++k) add_multiple(-lower[i][k], y[k], y[i], 0, n);
        }
        for (int i = n - 1; i >= 0; --i) {
            for (int k = i + 1; k < n; ++k) add_multiple(-upper[i][k], y[k], y[i], 0, n);
            for (int j = 0; j < n; ++j) y[i][j] /= diagonal[i];
        }
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < n; ++j) y[i][j] /= scale[i];
        }
        return y;
    }

    MFLOW_INLINE Invertible run(bool inverted, void* weight_out, void* bias_out) const {
        A *to = static_cast<A*>(weight_out), *bias_to = static_cast<A*>(bias_out);
        const Square w = weight();
        if (!inverted) {
            for (int i = 0; i < n; ++i) bias_to[i] = A(dot(w[i], bias.data(), 0, n));
            std::copy(w.values.begin(), w.values.end(), to);
            return Invertible::yes;
        }
        const Square r = inverse();
        const auto finite = [](const std::vector<double>& values) {
            return std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(A(v)); });
        };
        const bool singular = std::count(diagonal.begin(), diagonal.end(), 0.0) ||
                              std::count(scale.begin(), scale.end(), 0.0);
        const Invertible found = !finite(w.values)               ? Invertible::infinite
                                 : singular || !finite(r.values) ? Invertible::singular
                                                                 : Invertible::yes;
        if (found != Invertible::yes) {
            std::fill_n(to, size_t(n) * n, std::numeric_limits<A>::quiet_NaN());
        } else {
            std::copy(r.values.begin(), r.values.end(), to);
        }
        for (int i = 0; i < n; ++i) bias_to[i] = A(-bias[i]);  // -W^-1 (W bias)
        return found;
    }

    MFLOW_INLINE void backward(bool inverted, const void* dweight, const void* dbias_in, double dlog_det,
                               const FactorGradients& out) const {
        const A *from = static_cast<const A*>(dweight), *dbias_from = static_cast<const A*>(dbias_in);
        const Square w = weight();
        Square g(n);
        std::vector<double> dbias(n);
        std::copy(from, from + size_t(n) * n, g.values.begin());
        if (inverted) {  // d W = -R^T dR R^T
            const Square r = transposed(inverse());
            g = product(product(r, g), r);
            for (double& v : g.values) v = -v;
            for (int i = 0; i < n; ++i) dbias[i] = -double(dbias_from[i]);
            dlog_det = -dlog_det;
        } else {
            for (int i = 0; i < n; ++i) {
                const double db = dbias_from[i];
                add_multiple(db, w[i], dbias.data(), 0, n);
                add_multiple(db, bias.data(), g[i], 0, n);
            }
        }
        std::vector<double> dlog_scale(n, dlog_det);
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < n; ++j) {
                dlog_scale[j] += g[i][j] * w[i][j];
                g[i][j] *= scale[j];
            }
        }
        g = product(transposed(permutation), g);
        const Square dupper = product(transposed(lower), g), dlower = product(g, transposed(upper));
        A *lower_to = static_cast<A*>(out.lower), *upper_to = static_cast<A*>(out.upper);
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < n; ++j) {
                lower_to[i * n + j] = j < i ? A(dlower[i][j]) : A(0);
                upper_to[i * n + j] = j > i ? A(dupper[i][j]) : A(0);
            }
            static_cast<A*>(out.log_diagonal)[i] = A(dupper[i][i] * diagonal[i] + dlog_det);
            if (out.log_scale) static_cast<A*>(out.log_scale)[i] = A(dlog_scale[i]);
            if (out.bias) static_cast<A*>(out.bias)[i] = A(dbias[i]);
        }
    }
};

// Function clones cannot be templates.
#define MFLOW_FOLD(A)                                                                                      \
    MFLOW_CLONES Invertible run_fold(A, const Factors& f, int n, bool inverse, void* w, void* b,           \
                                     double& log_det) {                                                    \
        const Fold<A> fold(f, n);                                                                          \
        log_det += inverse ? -fold.log_det : fold.log_det;                                                 \
        return fold.run(inverse, w, b);                                                                    \
    }                                                                                                      \
    MFLOW_CLONES void run_backward(A, const Factors& f, int n, bool inverse, const void* dw,               \
                                   const void* db, double dlog_det, const FactorGradients& gradients) {    \
        Fold<A>(f, n).backward(inverse, dw, db, dlog_det, gradients);                                      \
    }
MFLOW_FOLD(float)
MFLOW_FOLD(double)
#undef MFLOW_FOLD

}  // namespace

Invertible fold_cpu(const Factors& f, int64_t channels, bool is_double, bool inverse, void* weight, void* bias,
                    double& log_det) {
    const int n = int(channels);
    return is_double ? run_fold(double(), f, n, inverse, weight, bias, log_det)
                     : run_fold(float(), f, n, inverse, weight, bias, log_det);
}

void fold_backward_cpu(const Factors& f, int64_t channels, bool is_double, bool inverse, const void* dweight,
                       const void* dbias, double dlog_det, const FactorGradients& gradients) {
    const int n = int(channels);
    is_double ? run_backward(double(), f, n, inverse, dweight, dbias, dlog_det, gradients)
              : run_backward(float(), f, n, inverse, dweight, dbias, dlog_det, gradients);
}

}  // namespace mflow

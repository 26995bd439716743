// The activations of masked networks, elementwise. mflow_kernels/ops/masked_network.py has the list.
#pragma once

#include <cmath>

#include "../common/functions.h"
#include "../common/table.h"
#include "../coupling/scale.h"

namespace mflow {

template <class A>
MFLOW_INLINE A sigmoid_of(A x) {
    const A e = exp_of(x < A(0) ? x : -x);
    return (x < A(0) ? e : A(1)) / (A(1) + e);
}
template <class A>
MFLOW_INLINE A signed_tanh(A x) {
    const A t = tanh_of(x < A(0) ? -x : x).value;
    return x < A(0) ? -t : t;
}
template <class A>
MFLOW_INLINE A elu_of(A x, A alpha, A over) {
    const A below = alpha * exp_and_minus1(x > A(0) ? A(0) : x * over).minus1;
    return x > A(0) ? x : below;
}

struct Relu {
    static constexpr const char* name = "relu";
    template <class A>
    static MFLOW_INLINE A of(A x, A) {
        return x < A(0) ? A(0) : x;  // NaN stays
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A) {
        return x > A(0) ? A(1) : A(0);
    }
};
struct LeakyRelu {
    static constexpr const char* name = "leaky_relu";
    template <class A>
    static MFLOW_INLINE A of(A x, A slope) {
        return x > A(0) ? x : slope * x;
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A c) {
        return x > A(0) ? A(1) : c;
    }
};
struct Elu {
    static constexpr const char* name = "elu";
    template <class A>
    static MFLOW_INLINE A of(A x, A alpha) {
        return elu_of(x, alpha, A(1));
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A c) {
        return x > A(0) ? A(1) : c * exp_of(x > A(0) ? A(0) : x);
    }
};
struct Selu {
    static constexpr const char* name = "selu";
    template <class A>
    static MFLOW_INLINE A of(A x, A) {
        return A(1.0507009873554804934193349852946) * elu_of(x, A(1.6732632423543772848170429916717), A(1));
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A) {
        return A(1.0507009873554804934193349852946) *
               (x > A(0) ? A(1) : A(1.6732632423543772848170429916717) * exp_of(x > A(0) ? A(0) : x));
    }
};
struct Celu {
    static constexpr const char* name = "celu";
    template <class A>
    static MFLOW_INLINE A of(A x, A alpha) {
        return elu_of(x, alpha, A(1) / alpha);
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A c) {
        return x > A(0) ? A(1) : exp_of((x > A(0) ? A(0) : x) / c);
    }
};
struct TanhUnit {
    static constexpr const char* name = "tanh";
    template <class A>
    static MFLOW_INLINE A of(A x, A) {
        return signed_tanh(x);
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A) {
        return tanh_of(x < A(0) ? -x : x).slope;
    }
};
struct SigmoidUnit {
    static constexpr const char* name = "sigmoid";
    template <class A>
    static MFLOW_INLINE A of(A x, A) {
        return sigmoid_of(x);
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A) {
        const A e = exp_of(x < A(0) ? x : -x);
        return e / ((A(1) + e) * (A(1) + e));
    }
};
struct Silu {
    static constexpr const char* name = "silu";
    template <class A>
    static MFLOW_INLINE A of(A x, A) {
        return x * sigmoid_of(x);
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A) {
        const A s = sigmoid_of(x);
        return s * (A(1) + x * (A(1) - s));
    }
};
struct Gelu {
    static constexpr const char* name = "gelu";
    template <class A>
    static MFLOW_INLINE A of(A x, A) {
        return x * A(0.5) * (A(1) + std::erf(x * A(0.70710678118654752440)));
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A) {
        return A(0.5) * (A(1) + std::erf(x * A(0.70710678118654752440))) +
               x * A(0.39894228040143267794) * exp_of(A(-0.5) * x * x);
    }
};
struct GeluTanh {
    static constexpr const char* name = "gelu_tanh";
    template <class A>
    static MFLOW_INLINE A of(A x, A) {
        const A inner = A(0.79788456080286535588) * (x + A(0.044715) * x * x * x);
        return A(0.5) * x * (A(1) + signed_tanh(inner));
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A) {
        const A root = A(0.79788456080286535588), cubic = A(0.044715);
        const A inner = root * (x + cubic * x * x * x);
        const A slope = tanh_of(inner < A(0) ? -inner : inner).slope;
        return A(0.5) * (A(1) + signed_tanh(inner) + x * slope * root * (A(1) + A(3) * cubic * x * x));
    }
};
struct SoftplusUnit {
    static constexpr const char* name = "softplus";
    template <class A>
    static MFLOW_INLINE A of(A x, A beta) {
        const A r = beta * x;
        const A e = exp_of(r < A(0) ? r : -r);
        // Above the threshold of 20, torch returns x.
        return r > A(20) ? x : ((r < A(0) ? A(0) : r) + log1p_of(e)) / beta;
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A c) {
        return c * x > A(20) ? A(1) : sigmoid_of(c * x);
    }
};
struct IdentityUnit {
    static constexpr const char* name = "identity";
    template <class A>
    static MFLOW_INLINE A of(A x, A) {
        return x;
    }
    template <class A>
    static MFLOW_INLINE A slope(A, A) {
        return A(1);
    }
};
struct Sin {
    static constexpr const char* name = "sin";
    template <class A>
    static MFLOW_INLINE A of(A x, A) {
        return std::sin(x);
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A) {
        return std::cos(x);
    }
};
struct Cos {
    static constexpr const char* name = "cos";
    template <class A>
    static MFLOW_INLINE A of(A x, A) {
        return std::cos(x);
    }
    template <class A>
    static MFLOW_INLINE A slope(A x, A) {
        return -std::sin(x);
    }
};
struct Wrap {
    static constexpr const char* name = "wrap";
    template <class A>
    static MFLOW_INLINE A of(A x, A bound) {
        const A rest = std::fmod(x, A(2) * bound);
        return (rest < A(0) ? rest + A(2) * bound : rest) - bound;
    }
    template <class A>
    static MFLOW_INLINE A slope(A, A) {
        return A(1);
    }
};

using Activations = Table<Relu, LeakyRelu, Elu, Selu, Celu, TanhUnit, SigmoidUnit, Silu, Gelu, GeluTanh,
                          SoftplusUnit, IdentityUnit, Sin, Cos, Wrap>;

}  // namespace mflow

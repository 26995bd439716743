// MFLOW_INLINE: the function is always inlined, on the GPU too, so that loops over it vectorize.
#pragma once

#if defined(__CUDACC__)
#define MFLOW_INLINE __host__ __device__ __forceinline__
#else
#define MFLOW_INLINE inline __attribute__((always_inline))
#endif

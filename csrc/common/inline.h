// MFLOW_INLINE: always inlined, so that a loop over the function vectorizes; on the GPU too.
#pragma once

#if defined(__CUDACC__)
#define MFLOW_INLINE __host__ __device__ __forceinline__
#else
#define MFLOW_INLINE inline __attribute__((always_inline))
#endif

/* XXH3-128 of many bytes, with the widest vectors that this processor has.
 *
 *   sr_xxh3_128(data, size)    as XXH3_128bits, whatever the processor
 *   sr_xxh3_choose(wide)       which code does it: called once at import, and by the tests
 *
 * A wheel is built for the portable instruction set, SSE2 on x86-64, whose XXH3 reads 17 bytes a nanosecond where AVX2
 * reads 35. setup.py compiles xxh3_wide.c for AVX2 on top of that where a compiler can (SR_XXH3_WIDE); whether it may be
 * called is asked of the processor. XXH3 gives the same digest with every instruction set.
 */
#ifndef SR_XXH3_WIDE_H
#define SR_XXH3_WIDE_H

#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include "xxhash.h"

#ifdef SR_XXH3_WIDE
void sr_xxh3_128_wide(const void *data, size_t size, XXH128_hash_t *out);
static int sr_xxh3_is_wide;
#endif

/* Below this, the code for short inputs is inlined and uses no vectors. */
#define SR_XXH3_LONG 1024

static inline XXH128_hash_t sr_xxh3_128(const void *data, size_t size) {
#ifdef SR_XXH3_WIDE
    if (size >= SR_XXH3_LONG && sr_xxh3_is_wide) {
        XXH128_hash_t out;
        sr_xxh3_128_wide(data, size, &out);
        return out;
    }
#endif
    return XXH3_128bits(data, size);
}

/* Returns whether the wide code is in use from now on: asked for, compiled in, and known to the processor. */
static inline int sr_xxh3_choose(int wide) {
#ifdef SR_XXH3_WIDE
    __builtin_cpu_init();
    sr_xxh3_is_wide = wide && __builtin_cpu_supports("avx2");
    return sr_xxh3_is_wide;
#else
    (void)wide;
    return 0;
#endif
}

#endif

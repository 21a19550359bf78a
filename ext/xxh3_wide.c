/* XXH3-128 for AVX2: the one translation unit that is compiled beyond the portable instruction set; see xxh3_wide.h.
 *
 * NB: nothing but this function may leave it. An inline function of a header that was compiled here and kept by the linker
 * for everybody would bring AVX2 to processors without it; XXH_INLINE_ALL makes all of xxHash static.
 */
#define XXH_INLINE_ALL
#define XXH_VECTOR XXH_AVX2
#include "xxhash.h"

void sr_xxh3_128_wide(const void *data, size_t size, XXH128_hash_t *out);

void sr_xxh3_128_wide(const void *data, size_t size, XXH128_hash_t *out) { *out = XXH3_128bits(data, size); }

/* A libcublasLt.so.13 that has an algorithm for nothing, so that all products go to FORGE's own
 * kernels. */
#define EXPORT __attribute__((visibility("default")))
#define NOT_SUPPORTED 15

static int object;

#define CREATE(name)                                                                               \
    EXPORT int name(void **out) {                                                                  \
        *out = &object;                                                                            \
        return 0;                                                                                  \
    }
#define NOTHING(name)                                                                              \
    EXPORT int name(void) { return 0; }

CREATE(cublasLtCreate)
CREATE(cublasLtMatmulDescCreate)
CREATE(cublasLtMatrixLayoutCreate)
CREATE(cublasLtMatmulPreferenceCreate)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy)

EXPORT int cublasLtMatmulAlgoGetHeuristic(void) { return NOT_SUPPORTED; }
EXPORT int cublasLtMatmul(void) { return NOT_SUPPORTED; }

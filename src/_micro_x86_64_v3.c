/* The micro-kernels for x86-64-v3: AVX2 and FMA. */
#define MODULE _micro_x86_64_v3
#include "micro_module.h"

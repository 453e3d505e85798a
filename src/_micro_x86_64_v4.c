/* The micro-kernels for x86-64-v4: AVX-512. */
#define MODULE _micro_x86_64_v4
#include "micro_module.h"

/* The micro-kernels for the baseline of the processor's family. */
#define MODULE _micro_baseline
#include "micro_module.h"

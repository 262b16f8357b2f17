// Compiled with -mavx2 -mf16c -mfma.
#include "cpu_decode.h"

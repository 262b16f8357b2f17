// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mf16c -mfma -mavx2.
#include "cpu_decode.h"

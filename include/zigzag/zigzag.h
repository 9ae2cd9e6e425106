#pragma once

#include "zigzag/attention.h"
#include "zigzag/communicator.h"
#include "zigzag/error.h"
#include "zigzag/layout.h"
#include "zigzag/options.h"
#include "zigzag/plan.h"
#include "zigzag/system.h"
#include "zigzag/tensor.h"

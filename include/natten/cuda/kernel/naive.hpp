// SPDX-License-Identifier: MIT
// Attention and its gradients straight from the definition: any head dim, every feature.
#pragma once

#include "natten/cuda/kernel/naive_backward.hpp"
#include "natten/cuda/kernel/naive_forward.hpp"

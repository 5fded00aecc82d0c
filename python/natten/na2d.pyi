# SPDX-License-Identifier: MIT
# A module of sys.modules only, see _former_modules.py.
from natten.functional import na2d as na2d
from natten.functional import na2d_av as na2d_av
from natten.functional import na2d_qk as na2d_qk
from natten.modules import NeighborhoodAttention2D as NeighborhoodAttention2D

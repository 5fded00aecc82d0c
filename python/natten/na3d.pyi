# SPDX-License-Identifier: MIT
# A module of sys.modules only, see _former_modules.py.
from natten.functional import na3d as na3d
from natten.functional import na3d_av as na3d_av
from natten.functional import na3d_qk as na3d_qk
from natten.modules import NeighborhoodAttention3D as NeighborhoodAttention3D

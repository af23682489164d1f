"""Orders and reports as Flower messages, and back: a few flat tensors, bit-packed masks, everything checked on arrival.

An order's message:
    arrays   "model"    float32, the cut tensors of each distinct submodel, end to end, in the layout's order
             "units"    uint8, per distinct submodel and prunable axis the held units' bits, then the trained ones'
             "private"  float32, simulations only: see `private`
    config   who is asked for what (`ORDER`), and what it is to minimise ("objective.lr" and so on)

Its reply:
    arrays   "update"   float32, per client the trained entries of every tensor, end to end
             "rows"     int32, touched item numbers, where only these travel
             "present"  uint8, bits: which rows the client trained (the others are padding, or untouched)
             "private"  as above
    metrics  "num-examples", and lists with one entry per order
    config   the tickets it answers, in the order of its clients

Nothing here changes what it is given: in one process, sender and receiver share a message's arrays.
"""

from fedprune.flower.wire.fields import read_array as read_array
from fedprune.flower.wire.fields import read_config as read_config
from fedprune.flower.wire.fields import read_metric as read_metric
from fedprune.flower.wire.fields import read_option as read_option
from fedprune.flower.wire.fields import write_numbers as write_numbers
from fedprune.flower.wire.orders import Parcel as Parcel
from fedprune.flower.wire.orders import read_orders as read_orders
from fedprune.flower.wire.orders import write_orders as write_orders
from fedprune.flower.wire.replies import Stacked as Stacked
from fedprune.flower.wire.replies import read_reply as read_reply
from fedprune.flower.wire.replies import write_reply as write_reply

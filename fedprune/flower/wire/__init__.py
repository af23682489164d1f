"""Orders and reports as Flower messages, and back: a few flat tensors, bit-packed masks, everything checked on arrival.

An order's message:
    arrays   "model"    float32, of each distinct cut the entries that are there, end to end, in the layout's order; where the
                        whole model is to teach (`trainer.teaches`), all of it instead, and the device cuts
             "codes"    int8, the entries of matrices, where that is the codec's precision ("model" holds none of these then)
             "halves"   float16, beside "codes": tensor after tensor, a matrix's scales or a vector's entries (`precision`)
             "units"    uint8, per distinct submodel and prunable axis the held units' bits, then the trained ones'
             "entries"  uint8, per distinct submodel one bit for each held entry of the tensors that it masks, where any does
             "private"  float32, simulations only: see `private`
    config   who is asked for what, what it is to minimise and how it travels ("objective.lr", "codec.rows" and so on; where
             orders differ in that, "plans" numbers them, and the terms of plan 1 begin with it: "1.objective.lr"), which
             tensors each distinct submodel masks ("masked", their names), and whether it reports masked entries all the same
             ("through")

Its reply:
    arrays   "update"   float32, per client the trained entries of every tensor that are there, end to end
             "codes"    int8, and
             "halves"   float16, instead of it, as above; the server knows what it asked for, so a reply does not repeat it
             "rows"     int32, touched item numbers, where only these travel
             "present"  uint8, bits: which rows the client trained (the others are padding, or untouched)
             "drawn"    uint8, bits: which of them it reports, where the codec samples
             "private"  as above
    metrics  "num-examples", and lists with one entry per order ("gates" where the objective asks for them)
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
from fedprune.flower.wire.replies import gates as gates
from fedprune.flower.wire.replies import read_reply as read_reply
from fedprune.flower.wire.replies import write_reply as write_reply

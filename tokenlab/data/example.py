"""The record format of prepared TFDS sets, `tf.train.Example`, read without TensorFlow.

The message is described here field by field, with the numbers of TensorFlow's public `example.proto` and
`feature.proto`; protobuf's C runtime then parses it: measured on one core, 200,000 to 500,000 records/s, so that not
parsing but reading the file decides how fast a set is read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

LISTS = {"bytes": "bytes_list", "float": "float_list", "int64": "int64_list"}


def parse(record: bytes) -> Mapping[str, Any]:
    """The features of a record by name; each has the fields `bytes_list`, `float_list`, `int64_list`.

    Raises:
      google.protobuf.message.DecodeError: the bytes are no such message.
    """
    return _example().FromString(record).features.feature


@functools.cache
def _example() -> Any:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="tokenlab/example.proto", package="tensorflow", syntax="proto3"
    )

    def add(message: Any, name: str, number: int, kind: int, label: int, target: str = "") -> None:
        added = message.field.add(name=name, number=number, type=kind, label=label)
        if target:
            added.type_name = f".tensorflow.{target}"

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    values = (
        ("BytesList", field.TYPE_BYTES),
        ("FloatList", field.TYPE_FLOAT),
        ("Int64List", field.TYPE_INT64),
    )
    feature = descriptor_pb2.DescriptorProto(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, ((name, kind), key) in enumerate(zip(values, LISTS.values(), strict=True), start=1):
        add(file.message_type.add(name=name), "value", 1, kind, many)
        add(feature, key, number, field.TYPE_MESSAGE, one, name)
        feature.field[-1].oneof_index = 0
    file.message_type.append(feature)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING, one)
    add(entry, "value", 2, field.TYPE_MESSAGE, one, "Feature")
    add(features, "feature", 1, field.TYPE_MESSAGE, many, "Features.FeatureEntry")
    add(file.message_type.add(name="Example"), "features", 1, field.TYPE_MESSAGE, one, "Features")
    # A pool of its own: in the default one TensorFlow's messages of the same names would collide with these.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))

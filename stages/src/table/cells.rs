//! Maps Rust types to Arrow column types.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanArray, ListArray, PrimitiveArray, StringArray};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{ArrowPrimitiveType, DataType, Field, Float32Type, Float64Type, Int64Type, UInt32Type};
use serde_json::Value;

use super::view::{cut, type_name};

/// A type of column values: `String`, `bool`, `f64`, `f32`, `i64`, `u32`, a `words!` enum, and `Vec` and `Option` of
/// these.
pub trait Cell: Sized {
    const NULLABLE: bool = false;
    /// The only words that the column or its lists may hold, each with the lines of its doc comment; empty: any value.
    const WORDS: &'static [(&'static str, &'static [&'static str])] = &[];

    fn data_type() -> DataType;

    fn array<'a>(values: impl Iterator<Item = Option<&'a Self>>) -> ArrayRef
    where
        Self: 'a;

    /// The value in `row`, which must not be null unless [`Cell::NULLABLE`].
    ///
    /// # Errors
    /// If the array has another type or the value is not valid for this type.
    fn cell(array: &dyn Array, row: usize) -> Result<Self, String>;

    /// # Errors
    /// If the JSON value is not of this type.
    fn from_json(value: &Value) -> Result<Self, String>;
}

/// Message for a JSON value that is not a `C`.
pub fn mismatch<C: Cell>(value: &Value) -> String {
    format!("expected {}, found {}", type_name(&C::data_type()), cut(&value.to_string(), 60))
}

/// [`Cell::cell`] with the column's name in errors.
///
/// # Errors
/// As [`Cell::cell`].
pub fn named<C: Cell>(column: &str, array: &ArrayRef, row: usize) -> Result<C, String> {
    C::cell(array.as_ref(), row).map_err(|what| format!("column `{column}`: {what}"))
}

fn as_type<A: 'static>(array: &dyn Array) -> Result<&A, String> {
    array
        .as_any()
        .downcast_ref::<A>()
        .ok_or_else(|| format!("has the unexpected type {}", type_name(array.data_type())))
}

impl Cell for String {
    fn data_type() -> DataType {
        DataType::Utf8
    }

    fn array<'a>(values: impl Iterator<Item = Option<&'a Self>>) -> ArrayRef {
        Arc::new(values.collect::<StringArray>())
    }

    fn cell(array: &dyn Array, row: usize) -> Result<Self, String> {
        Ok(as_type::<StringArray>(array)?.value(row).to_owned())
    }

    fn from_json(value: &Value) -> Result<Self, String> {
        value.as_str().map(str::to_owned).ok_or_else(|| mismatch::<Self>(value))
    }
}

impl Cell for bool {
    fn data_type() -> DataType {
        DataType::Boolean
    }

    fn array<'a>(values: impl Iterator<Item = Option<&'a Self>>) -> ArrayRef {
        Arc::new(values.map(Option::<&bool>::copied).collect::<BooleanArray>())
    }

    fn cell(array: &dyn Array, row: usize) -> Result<Self, String> {
        Ok(as_type::<BooleanArray>(array)?.value(row))
    }

    fn from_json(value: &Value) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| mismatch::<Self>(value))
    }
}

macro_rules! number {
    ($type:ty, $arrow:ty, $of_json:expr) => {
        impl Cell for $type {
            fn data_type() -> DataType {
                <$arrow as ArrowPrimitiveType>::DATA_TYPE
            }

            fn array<'a>(values: impl Iterator<Item = Option<&'a Self>>) -> ArrayRef {
                Arc::new(values.map(Option::<&$type>::copied).collect::<PrimitiveArray<$arrow>>())
            }

            fn cell(array: &dyn Array, row: usize) -> Result<Self, String> {
                Ok(as_type::<PrimitiveArray<$arrow>>(array)?.value(row))
            }

            fn from_json(value: &Value) -> Result<Self, String> {
                let of_json: fn(&Value) -> Option<Self> = $of_json;
                of_json(value).ok_or_else(|| mismatch::<Self>(value))
            }
        }
    };
}

number!(f64, Float64Type, Value::as_f64);
number!(f32, Float32Type, |value| value.as_f64().map(|x| x as f32));
number!(i64, Int64Type, Value::as_i64);
number!(u32, UInt32Type, |value| value.as_u64()?.try_into().ok());

impl<T: Cell> Cell for Option<T> {
    const NULLABLE: bool = true;
    const WORDS: &'static [(&'static str, &'static [&'static str])] = T::WORDS;

    fn data_type() -> DataType {
        T::data_type()
    }

    fn array<'a>(values: impl Iterator<Item = Option<&'a Self>>) -> ArrayRef
    where
        Self: 'a,
    {
        T::array(values.map(|value| value.and_then(Option::as_ref)))
    }

    fn cell(array: &dyn Array, row: usize) -> Result<Self, String> {
        if array.is_null(row) { Ok(None) } else { T::cell(array, row).map(Some) }
    }

    fn from_json(value: &Value) -> Result<Self, String> {
        if value.is_null() { Ok(None) } else { T::from_json(value).map(Some) }
    }
}

impl<T: Cell> Cell for Vec<T> {
    const WORDS: &'static [(&'static str, &'static [&'static str])] = T::WORDS;

    fn data_type() -> DataType {
        DataType::List(item::<T>())
    }

    fn array<'a>(values: impl Iterator<Item = Option<&'a Self>>) -> ArrayRef
    where
        Self: 'a,
    {
        let lists: Vec<Option<&Self>> = values.collect();
        let offsets = OffsetBuffer::from_lengths(lists.iter().map(|list| list.map_or(0, Vec::len)));
        let present: NullBuffer = lists.iter().map(Option::is_some).collect::<Vec<bool>>().into();
        let items = T::array(lists.into_iter().flatten().flatten().map(Some));
        Arc::new(ListArray::new(item::<T>(), offsets, items, Some(present).filter(|p| p.null_count() > 0)))
    }

    fn cell(array: &dyn Array, row: usize) -> Result<Self, String> {
        let items = as_type::<ListArray>(array)?.value(row);
        if !T::NULLABLE && items.null_count() > 0 {
            return Err("holds a null inside a list".to_owned());
        }
        (0..items.len()).map(|i| T::cell(items.as_ref(), i)).collect()
    }

    fn from_json(value: &Value) -> Result<Self, String> {
        value.as_array().ok_or_else(|| mismatch::<Self>(value))?.iter().map(T::from_json).collect()
    }
}

/// The field of list elements, with Parquet's standard name.
fn item<T: Cell>() -> Arc<Field> {
    Arc::new(Field::new("element", T::data_type(), T::NULLABLE))
}

//! Macros that declare tables and closed sets of words.

/// Declares a struct with public fields and implements [`Row`](crate::table::Row) for it: one column per field, in
/// order. The doc comments describe the table to users.
#[macro_export]
macro_rules! table {
    ($(#[doc = $doc:literal])* $(#[derive($($derive:ident),*)] #[serde($($serde:tt)*)])? $vis:vis struct $name:ident { $($(#[doc = $field_doc:literal])* $field_vis:vis $field:ident : $type:ty),* $(,)? }) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq)]
        $(#[derive($($derive),*)] #[serde($($serde)*)])?
        $vis struct $name { $($(#[doc = $field_doc])* $field_vis $field: $type),* }

        impl $crate::table::Row for $name {
            const ABOUT: &'static [&'static str] = &[$($doc),*];

            fn columns() -> Vec<$crate::table::Column> {
                vec![$($crate::table::Column::of::<$type>(stringify!($field), &[$($field_doc),*])),*]
            }

            fn arrays(rows: &[Self]) -> Vec<$crate::table::ArrayRef> {
                vec![$(<$type as $crate::table::Cell>::array(rows.iter().map(|row| Some(&row.$field)))),*]
            }

            fn rows(arrays: &[$crate::table::ArrayRef]) -> Result<Vec<Self>, String> {
                let [$($field),*] = arrays else { return Err("wrong number of columns".to_owned()) };
                let n = arrays.first().map_or(0, |a| $crate::table::Array::len(a));
                (0..n)
                    .map(|i| Ok(Self { $($field: $crate::table::cell::<$type>(stringify!($field), $field, i)?),* }))
                    .collect()
            }

            fn from_json(mut row: $crate::table::JsonRow) -> Result<Self, String> {
                $(let $field = row.cell::<$type>(stringify!($field));)*
                row.finish::<Self>()?;
                match ($($field,)*) {
                    ($(Some($field),)*) => Ok(Self { $($field),* }),
                    // `finish` has reported the fault.
                    _ => Err(String::new()),
                }
            }
        }
    };
}

/// Declares a closed set of words: an enum that is stored as text in tables and JSON, and shown as text in messages.
#[macro_export]
macro_rules! words {
    ($(#[$meta:meta])* $vis:vis enum $name:ident { $($(#[doc = $doc:literal])* $variant:ident = $word:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        $vis enum $name { $($(#[doc = $doc])* #[serde(rename = $word)] $variant),* }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(s: &str) -> Result<Self, String> {
                match s { $($word => Ok(Self::$variant),)* _ => Err(format!("`{s}` is none of {}", [$($word),*].join(", "))) }
            }
        }

        impl $crate::table::Cell for $name {
            const WORDS: &'static [(&'static str, &'static [&'static str])] = &[$(($word, &[$($doc),*])),*];

            fn data_type() -> $crate::table::DataType {
                $crate::table::DataType::Utf8
            }

            fn array<'a>(values: impl Iterator<Item = Option<&'a Self>>) -> $crate::table::ArrayRef {
                std::sync::Arc::new(values.map(|v| v.map(|v| v.as_str())).collect::<$crate::table::StringArray>())
            }

            fn cell(array: &dyn $crate::table::Array, row: usize) -> Result<Self, String> {
                let words = array.as_any().downcast_ref::<$crate::table::StringArray>().ok_or("is not utf8")?;
                words.value(row).parse()
            }

            fn from_json(value: &$crate::table::Value) -> Result<Self, String> {
                value.as_str().ok_or_else(|| $crate::table::mismatch::<Self>(value))?.parse()
            }
        }
    };
}
